"""Adapters that travel alone against merged ones: how fast vLLM samples, what travels, how right.

    PYTHONPATH=.:tests/support python tests/bench/adapters_alone.py [--model M] [--dtype D]

One learner, two engines, one after the other at every turn: 64 completions of 32 tokens, the median
of the turns. Adapters of rank 16 on all linear layers, after two steps on made-up groups.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
from collections import defaultdict
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from learner_models import random_groups, trajectories

from common.config.sections import AdapterConfig
from common.weights.transport import Receivers
from deploy.models.resolve import resolve_model
from learner.policy.shape import shape_of_config
from learner.training.rank import LearnerRank
from learner.weights.canary import largest_gap

# What tests share is held to fewer rules of types.
engine_beside: Any = importlib.import_module("engine_beside").engine_beside
worker: Any = importlib.import_module("learner_ranks").worker

ADAPTER = AdapterConfig(rank=16)
LONGEST, SEQUENCES, TOKENS, STEPS = 256, 64, 32, 2
WAYS = ("merged", "adapter")
GROUPS = [(40, (24, 24)), (60, (30, 30))]


def vocabulary(folder: Path) -> int:
    """Tokens that the model in `folder` knows."""
    return shape_of_config(json.loads((folder / "config.json").read_text())).vocabulary


def bring(rank: LearnerRank, engine: Any, way: Any, version: int) -> tuple[int, float]:
    """Publish one way; bytes, and seconds for which the engine stood still."""
    rank._job = replace(rank._job, publish=way)
    rank.open_transport(Receivers([], 1, 1.0))
    shipment = rank.export_weights(version)
    return shipment.nbytes, engine.update(shipment.buckets, version)


def measure(folder: Path, dtype: str, turns: int) -> dict[str, dict[str, float]]:
    """Medians by way of publishing."""
    words = vocabulary(folder)
    prompts = [prompt.tolist() for prompt, _ in random_groups([(40, (1,))] * 8, 3, words)]
    asked = [prompt for prompt in prompts for _ in range(SEQUENCES // len(prompts))]
    canary = [[*p.tolist(), *c.tolist()] for p, (c, *_) in random_groups(GROUPS, 1, words)]
    scored = (canary, [len(sequence) - 24 for sequence in canary])
    found: dict[str, dict[str, list[float]]] = {way: defaultdict(list) for way in WAYS}
    settings = {"adapter": ADAPTER, "dtype": dtype, "learning_rate": 3e-4, "max_length": LONGEST}
    with ExitStack() as stack:
        rank = stack.enter_context(worker(folder, tokens_per_microbatch=512, **settings))
        engines = {
            way: stack.enter_context(
                engine_beside(
                    folder,
                    LONGEST,
                    dtype,
                    adapter=ADAPTER if way == "adapter" else None,
                    max_concurrent_sequences=SEQUENCES,
                    kv_cache_gib=0.5,
                )
            )
            for way in WAYS
        }
        for version in range(STEPS + 1):
            if version:
                made_up = trajectories(GROUPS, seed=version, version=version - 1, vocabulary=words)
                rank.step(made_up, version - 1, 0)
            for way, engine in engines.items():
                nbytes, stall_s = bring(rank, engine, way, version)
                found[way]["bytes"].append(nbytes)
                found[way]["stall_s"].append(stall_s)
                if version:  # before the first step both are the base
                    gap = largest_gap(rank.score(*scored), engine.score(*scored))
                    found[way]["canary_gap"].append(gap)
        for turn in range(turns + 1 if turns else 0):
            for way, engine in engines.items():
                rate = engine.rate(asked, TOKENS)
                if turn:  # the first warms up
                    found[way]["tokens_per_s"].append(rate)
    return {
        way: {
            name: max(all_) if name == "canary_gap" else statistics.median(all_)
            for name, all_ in columns.items()
        }
        for way, columns in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="builtin:smollm2-135m-instruct")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--turns", type=int, default=5)
    options = parser.parse_args()
    found = measure(Path(resolve_model(options.model)), options.dtype, options.turns)
    for way, columns in found.items():
        print(way, " ".join(f"{name}={value:.5g}" for name, value in columns.items()), flush=True)
    if options.turns:
        ratio = found["merged"]["tokens_per_s"] / found["adapter"]["tokens_per_s"]
        print(f"merged samples {ratio:.2f} times as fast")


if __name__ == "__main__":
    main()
