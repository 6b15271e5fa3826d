"""The planned memory of a rank against a count of the real modules on tensors without content."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from memory_counts import COUNTS, LOGITS_MIB, TOKENS, cases, peak

from common.config.sections import LearnerConfig, OptimizerConfig
from deploy.predict.models import MODELS
from learner.training.memory import LearnerLoad, fitting, learner_memory
from learner.training.optimizer import state_bytes

LEAN = LearnerConfig(optimizer=OptimizerConfig(state="8bit"), masters="bfloat16")
COUNTED = json.loads(COUNTS.read_text())
LOAD = LearnerLoad(shards=4, tokens=TOKENS, logits_mib=LOGITS_MIB, recompute=True)


def planned(case: dict[str, Any]) -> float:
    shape = MODELS[case["model"]]
    load = LearnerLoad(
        shards=case.get("shard_ranks", case["ranks"]),
        tokens=TOKENS,
        logits_mib=LOGITS_MIB,
        recompute=case.get("recompute", True),
        reduce_once=case.get("reduce_once", False),
        adapters=shape.adapter_parameters(case.get("adapter_rank", 0), "all-linear"),
        offload=case.get("offload", False),
    )
    if case.get("lean"):
        load = replace(load, master=2, state_bytes=state_bytes(LEAN))
    return learner_memory(shape, load).peak


def test_all_cases_are_counted() -> None:
    assert [{k: v for k, v in case.items() if k != "peak"} for case in COUNTED] == cases()


@pytest.mark.parametrize("case", COUNTED, ids=lambda c: " ".join(map(str, list(c.values())[:-1])))
def test_a_plan_is_within_five_percent_of_the_count(case: dict[str, Any]) -> None:
    """Six where adapters are trained: less of a layer is kept for the backward pass."""
    assert planned(case) == pytest.approx(
        case["peak"], rel=0.06 if "adapter_rank" in case else 0.05
    )


def test_the_counts_are_those_of_this_code() -> None:
    """The smallest of them, counted again: a change of what a rank holds has to be counted."""
    case = min(COUNTED, key=lambda case: case["peak"])
    assert peak(case) == pytest.approx(case["peak"], rel=0.01)


def test_the_fastest_way_that_fits_is_taken() -> None:
    shape = MODELS["Qwen/Qwen2.5-1.5B"]
    needs = {
        (again, once): learner_memory(
            shape, fitting(shape, LOAD, 0.0, recompute=again, reduce_once=once)
        ).peak
        for again in (False, True)
        for once in (False, True)
    }
    assert needs[False, True] > needs[False, False] > needs[True, True] > needs[True, False]
    for way, bytes_needed in needs.items():
        load = fitting(shape, LOAD, bytes_needed, None, None)
        assert (load.recompute, load.reduce_once) == way
    leanest = fitting(shape, LOAD, 1.0, None, None)
    assert (leanest.recompute, leanest.reduce_once) == (True, False)
    asked = fitting(shape, LOAD, 1e12, recompute=True, reduce_once=False)
    assert (asked.recompute, asked.reduce_once) == (True, False)


def test_a_large_model_reduces_in_every_micro_batch() -> None:
    assert not fitting(MODELS["Qwen/Qwen2.5-7B"], LOAD, 1e12, None, None).reduce_once


def test_one_rank_has_nothing_to_reduce_once() -> None:
    alone = LearnerLoad(shards=1, tokens=TOKENS, logits_mib=LOGITS_MIB, recompute=True)
    assert not fitting(MODELS["Qwen/Qwen2.5-1.5B"], alone, 1e12, None, None).reduce_once
