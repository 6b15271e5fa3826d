"""A run under a teacher on real parts, and its replay after the teacher is gone."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from common.record.credit_log import read_scores
from common.record.metrics import read_metrics
from deploy.inspector.replay import replay
from deploy.launch import train
from deploy.models.resolve import resolve_model

TINY = Path(__file__).resolve().parents[2] / "deploy" / "configs" / "tiny.yaml"

pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]


def _other_than(model: Path, folder: Path) -> Path:
    """A teacher with the vocabulary of `model` and weights of its own.

    It is so far from the policy that the sampled divergence, which may be below 0 by chance of
    close ones, is far above 0.
    """
    shutil.copytree(model, folder)
    weights = load_file(folder / "model.safetensors")
    torch.manual_seed(0)
    for tensor in weights.values():
        tensor.add_(0.5 * tensor.std() * torch.randn_like(tensor))
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_a_step_of_opd_is_replayed_without_the_teacher(tmp_path: Path) -> None:
    teacher = _other_than(resolve_model("builtin:tiny-chain-sum"), tmp_path / "teacher")
    keys = {"teacher.path": teacher, "eval.every": 0, "eval.prompts": 8, "checkpoint.every": 2}
    train(TINY, recipe="opd", name="taught", runs_dir=tmp_path, steps=3, **keys)
    shutil.rmtree(teacher)
    run = tmp_path / "taught"
    found = replay(run, 3)
    assert found.differences == []
    assert found.metrics["scorer/gap"] > 0
    advantages = [np.array(each) for each in found.credit["advantages"].to_pylist()]
    signs = np.concatenate(advantages)
    assert (signs > 0).any() and (signs < 0).any()


def test_a_teacher_in_a_generator_of_its_own_says_what_the_learners_would(tmp_path: Path) -> None:
    """Of the same completions: the runs are synchronous, and their first step is at version 0."""
    teacher = _other_than(resolve_model("builtin:tiny-chain-sum"), tmp_path / "teacher")
    keys = {"teacher.path": teacher, "eval.every": 0, "eval.prompts": 8, "checkpoint.every": 1}
    keys |= {"generator.max_staleness": 0, "runs_dir": tmp_path, "steps": 2}
    train(TINY, recipe="opd", name="held", **keys)
    train(TINY, recipe="opd", name="pooled", **keys, **{"teacher.count": 1})
    held, pooled = (read_scores(tmp_path / name, 1) for name in ("held", "pooled"))
    assert held.keys() == pooled.keys()
    for key, values in held.items():
        np.testing.assert_allclose(pooled[key], values, atol=1e-3)
    shutil.rmtree(teacher)
    found = replay(tmp_path / "pooled", 2)
    assert found.differences == []
    recorded = list(read_metrics(tmp_path / "pooled" / "metrics.jsonl"))[-1]
    assert recorded["time/wait_scores"] > 0
