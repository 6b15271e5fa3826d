"""Sample with and without `generator.stop` under the same seeds, and print both as JSON.

python tests/integration/stops_of_an_engine.py
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from actors.generation.engine import Completion, Engine
from actors.generation.texts import Texts, ending_tokens
from common.config.load import load_config
from common.weights.object_store import ObjectStore
from deploy.models.resolve import resolve_model
from deploy.models.tiny_model import OPENING

CONFIGS = Path(__file__).resolve().parents[2] / "deploy" / "configs"
STOPS: list[list[str | int]] = [[";"], ["+4", "=7"], ["7;7"]]
SEEDS = range(12)


async def main() -> None:
    folder = str(resolve_model("builtin:tiny-chain-sum"))
    keys = [f"model.path={folder}", "model.dtype=float32", "generator.max_staleness=0"]
    config = load_config([CONFIGS / "tiny.yaml"], keys, CONFIGS / "recipes")
    engine = await Engine.start(config.model, config.generator, ObjectStore(), seed=0)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer([f"{OPENING} 3 + 4 - 5 ="])["input_ids"][0]
    a_token = tokenizer(["2"])["input_ids"][0][0]
    ends, rows = ending_tokens(tokenizer, folder), []

    async def sample(seed: int, stop: list[str | int]) -> Completion:
        sampling = {"temperature": 1.0, "max_tokens": 24, "seed": seed, "stop": stop}
        return await engine.generate(f"{seed}-{stop}", prompt, sampling)

    for stop in [*STOPS, [a_token]]:
        for seed in SEEDS:
            free, stopped = await sample(seed, []), await sample(seed, stop)
            scored = await engine.score(f"score-{seed}", prompt + stopped.token_ids, len(prompt))
            rows.append(
                {
                    "stop": stop,
                    "free": free.token_ids,
                    "free_logprobs": free.logprobs,
                    "free_text": tokenizer.decode(free.token_ids, skip_special_tokens=False),
                    "stopped": stopped.token_ids,
                    "logprobs": stopped.logprobs,
                    "scored": scored,
                    "text": Texts(tokenizer, ends, stop).text(stopped),
                    "tokens_text": tokenizer.decode(stopped.token_ids, skip_special_tokens=False),
                    "finish_reason": stopped.finish_reason,
                }
            )
    engine.shutdown()
    print(json.dumps(rows))


asyncio.run(main())
