"""Generators in eight bits: what a plan refuses of them, and which are never quantised."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.config.load import load_with_origins
from common.config.sections import Config
from common.errors import UserError
from deploy.command.presets import CONFIGS, load
from deploy.credit.launch import _serving
from deploy.placement.config import teacher_generator
from deploy.predict.cluster_plan import ClusterPlan
from deploy.predict.plan import describe

INT8 = "generator.quantization=int8"


def config(preset: str, *keys: str) -> Config:
    return load(CONFIGS / f"{preset}.yaml", [*keys])


def test_a_plan_refuses_what_the_run_would_refuse_on_the_same_devices() -> None:
    """Where a run of that kind would start at all, so must its plan, and the other way round."""
    keys = ["weights.transport=object_store", "model.dtype=bfloat16"]
    with pytest.raises(UserError, match="int8 does not run on CUDA: set it to fp8"):
        ClusterPlan.of(config("qwen2.5-7b-2x8", *keys, INT8))
    ClusterPlan.of(config("qwen2.5-7b-2x8", *keys, "generator.quantization=fp8"))
    keys += ["learner.device=cpu", "generator.quantization=fp8"]
    loaded = load_with_origins([CONFIGS / "tiny.yaml"], keys, CONFIGS / "recipes")
    with pytest.raises(UserError, match="fp8 does not run on a CPU: set it to int8"):
        describe(loaded)


def test_what_measures_the_policy_computes_with_its_weights_as_they_are() -> None:
    asked = config("tiny", INT8)
    assert asked.generator.quantization == "int8"
    assert _serving(asked, Path("/policy")).generator.quantization is None
    assert teacher_generator(asked).quantization is None
