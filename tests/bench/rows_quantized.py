"""Generators with int8 against the same without: how much faster they sample, and how far off.

SmolLM2-135M-Instruct in bfloat16. Both engines are in this process and take turns, on one thread:
their times are those of the processor, which what else runs on the machine disturbs less. The gap
is that of what each sampled, to the learner's own forward pass in float32.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import time
from collections.abc import Callable, Coroutine
from typing import Any

os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
os.environ["OMP_NUM_THREADS"] = "1"
import torch
from harness import CONFIGS, Row, emit
from transformers import AutoModelForCausalLM, AutoTokenizer

from actors.generation.engine import Completion, Engine
from common.config.load import load_config
from common.weights.object_store import ObjectStore
from deploy.models.resolve import resolve_model

MODEL, SEQUENCES, TOKENS, REPEATS = "builtin:smollm2-135m-instruct", (16, 64), 32, 5
QUESTIONS = (
    "What is 3 + 4?",
    "What is 9 - 2? Answer with a number.",
    "Name the capital of France, and say why it is famous.",
    "Write a short poem about rain in the mountains.",
)
GAP_TOKENS, GAP_EACH = 48, 4


async def measure() -> list[Row]:
    folder = str(resolve_model(MODEL))
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}],
            add_generation_prompt=True,
            return_dict=False,
        )
        for question in QUESTIONS
    ]
    engines = {kind: await _engine(folder, kind) for kind in ("null", "int8")}
    rows = [await _speed(engines, prompts, sequences) for sequences in SEQUENCES]
    rows.append(await _gap(engines, prompts, folder))
    for engine in engines.values():
        engine.shutdown()
    return rows


async def _engine(folder: str, kind: str) -> Engine:
    keys = [f"model.path={folder}", f"generator.quantization={kind}"]
    config = load_config([CONFIGS / "smollm2.yaml"], keys, CONFIGS / "recipes")
    config.model.dtype = "bfloat16"
    return await Engine.start(config.model, config.generator, ObjectStore(), seed=0)


async def _sample(
    engine: Engine, prompts: list[list[int]], sequences: int, tokens: int, *, whole: bool
) -> list[Completion]:
    """`whole` samples as many tokens whatever they are."""
    asked: dict[str, Any] = {"temperature": 1.0, "max_tokens": tokens}
    if whole:
        asked |= {"ignore_eos": True, "min_tokens": tokens}
    name = f"{time.monotonic_ns()}"
    calls: list[Coroutine[Any, Any, Completion]] = [
        engine.generate(f"{name}-{index}", prompts[index % len(prompts)], asked)
        for index in range(sequences)
    ]
    return list(await asyncio.gather(*calls))


async def _speed(engines: dict[str, Engine], prompts: list[list[int]], sequences: int) -> Row:
    rates: dict[str, list[float]] = {kind: [] for kind in engines}
    for repeat in range(REPEATS + 1):
        for kind, engine in engines.items():
            started = time.process_time()
            await _sample(engine, prompts, sequences, TOKENS, whole=True)
            if repeat:
                rates[kind].append(sequences * TOKENS / (time.process_time() - started))
    plain, rounded = (statistics.median(rates[kind]) for kind in ("null", "int8"))
    return Row(
        f"generator with int8, tokens per second, SmolLM2-135M, {sequences} sequences",
        "the same without, in bfloat16",
        [a / b for a, b in zip(rates["int8"], rates["null"], strict=True)],
        1.0,
        True,
        f"{rounded:.0f} against {plain:.0f} tokens/s of one core's time",
    )


async def _gap(engines: dict[str, Engine], prompts: list[list[int]], folder: str) -> Row:
    learner = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    gaps: dict[str, list[float]] = {}
    for kind, engine in engines.items():
        sampled = await _sample(engine, prompts, GAP_EACH * len(prompts), GAP_TOKENS, whole=False)
        given = [prompts[index % len(prompts)] for index in range(len(sampled))]
        gaps[kind] = [_distance(learner, ids, one) for ids, one in zip(given, sampled, strict=True)]
    plain, rounded = (statistics.mean(gaps[kind]) for kind in ("null", "int8"))
    return Row(
        "gap of a generator with int8 to the policy, SmolLM2-135M",
        "that of bfloat16",
        [rounded / plain],
        4.0,
        False,
        f"{rounded:.3f} against {plain:.3f} nats a token of what each samples; the worst of "
        f"{len(gaps['int8'])} completions {max(gaps['int8']):.2f} against {max(gaps['null']):.2f}",
    )


@torch.no_grad()
def _distance(learner: Callable[..., Any], prompt: list[int], sampled: Completion) -> float:
    """Mean |log pi - log mu| of the tokens of a completion, nats."""
    ids = torch.tensor(prompt + sampled.token_ids)
    logprobs = learner(ids[None]).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    ours = logprobs.gather(-1, ids[len(prompt) :, None]).squeeze(-1)
    return float((ours - torch.tensor(sampled.logprobs)).abs().mean())


if __name__ == "__main__":
    emit(asyncio.run(measure()))
