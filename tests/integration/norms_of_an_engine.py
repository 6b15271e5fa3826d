"""Generate with the tiny model and print how often each provider computed a norm, as JSON.

python tests/integration/norms_of_an_engine.py
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from pathlib import Path
from typing import Any

from vllm.ir.op import IrOp

from actors.generation.engine import Engine
from common.config.load import load_config
from common.weights.object_store import ObjectStore
from deploy.models.resolve import resolve_model

CONFIGS = Path(__file__).resolve().parents[2] / "deploy" / "configs"
used: Counter[str] = Counter()
dispatch = IrOp.dispatch


def counted(op: Any, *args: Any, **kwargs: Any) -> Any:
    chosen = dispatch(op, *args, **kwargs)
    used[chosen.provider] += 1
    return chosen


async def main() -> None:
    folder = resolve_model("builtin:tiny-chain-sum")
    keys = [f"model.path={folder}", "model.dtype=float32"]
    config = load_config([CONFIGS / "tiny.yaml"], keys, CONFIGS / "recipes")
    engine = await Engine.start(config.model, config.generator, ObjectStore(), seed=0)
    IrOp.dispatch = counted
    completion = await engine.generate("one", [5, 6, 7], {"temperature": 1.0, "max_tokens": 4})
    engine.shutdown()
    print(json.dumps({"tokens": len(completion.token_ids), **used}))


asyncio.run(main())
