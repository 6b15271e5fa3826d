"""Count a learner rank's peak memory for the models of the presets; minutes, so it is committed.

    python tests/support/memory_counts.py     # writes tests/learner/memory_counts.json

`tests/learner/test_memory.py` counts one of them again, and holds `learner.training.memory` to all.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fake_step import count_step

from deploy.predict.models import MODELS

COUNTS = Path(__file__).resolve().parents[1] / "learner" / "memory_counts.json"
TOKENS, LOGITS_MIB = 14_592, 1024
_NAMES = ("Qwen/Qwen2.5-1.5B", "Qwen/Qwen2.5-7B", "meta-llama/Llama-3.1-8B")


def cases() -> list[dict[str, Any]]:
    """What is counted: every model on 1, 4, 8 and 32 ranks, and the other ways of a few."""
    every: list[dict[str, Any]] = [
        {"model": name, "ranks": ranks} for name in _NAMES for ranks in (1, 4, 8, 32)
    ]
    small, large = _NAMES[0], _NAMES[1]
    every += [{"model": small, "ranks": ranks, "recompute": False} for ranks in (4, 8)]
    every += [{"model": small, "ranks": ranks, "reduce_once": True} for ranks in (4, 8)]
    every += [{"model": large, "ranks": 32, "shard_ranks": 8}]
    every += [{"model": "Qwen/Qwen3-4B", "ranks": 4}]
    every += [{"model": "HuggingFaceTB/SmolLM3-3B", "ranks": 4, "recompute": False}]
    every += [{"model": large, "ranks": ranks, "adapter_rank": 16} for ranks in (1, 8)]
    every += [
        {"model": small, "ranks": 1, "adapter_rank": 32, "recompute": again}
        for again in (True, False)
    ]
    every += [{"model": small, "ranks": ranks, "lean": True} for ranks in (1, 4)]
    every += [{"model": small, "ranks": 4, "lean": True, "reduce_once": True}]
    every += [{"model": name, "ranks": 1, "lean": True, "offload": True} for name in _NAMES[:2]]
    every += [{"model": large, "ranks": 1, "adapter_rank": 16, "offload": True}]
    return every


def peak(case: dict[str, Any]) -> int:
    """Bytes of a case, by counting."""
    ways = {key: value for key, value in case.items() if key not in ("model", "ranks", "peak")}
    shape = MODELS[case["model"]]
    return count_step(shape, case["ranks"], tokens=TOKENS, logits_mib=LOGITS_MIB, **ways).peak


def main() -> None:
    """Count all, and write them down."""
    counted = []
    for case in cases():
        counted.append({**case, "peak": peak(case)})
        print(counted[-1], flush=True)
    COUNTS.write_text(json.dumps(counted, indent=1) + "\n")


if __name__ == "__main__":
    main()
