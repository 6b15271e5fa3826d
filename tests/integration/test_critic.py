"""A run with a critic on real parts: its resume and its replay."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.record.metrics import read_metrics
from deploy.command.presets import RECIPES
from deploy.inspector.replay import other_rule, replay
from deploy.launch import train

TINY = Path(__file__).resolve().parents[2] / "deploy" / "configs" / "tiny.yaml"

pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]


def test_a_step_with_a_critic_is_replayed_bitwise_past_a_resume(tmp_path: Path) -> None:
    """The critic of step 3 learned in steps 1 and 2, and came out of a checkpoint between."""
    keys = {"eval.every": 0, "eval.prompts": 8, "checkpoint.every": 2, "runs_dir": tmp_path}
    keys |= {"recipe": "ppo", "algorithm.advantage.critic.pretrain_steps": 1}
    train(TINY, name="valued", steps=2, **keys)
    run = tmp_path / "valued"
    train(TINY, resume=run, steps=3, **keys)
    found = replay(run, 3)
    assert found.differences == [] and found.from_step == 2
    assert found.metrics["critic/grad_norm"] > 0 and found.metrics["grad_norm"] > 0
    first, second, third = (r for r in read_metrics(run / "metrics.jsonl") if "grad_norm" in r)
    assert first["grad_norm"] == 0 and second["grad_norm"] > 0
    assert third["critic/value"] == found.metrics["critic/value"] != 0
    advantages = [a for row in found.credit["advantages"].to_pylist() for a in row or []]
    assert min(advantages) < 0 < max(advantages)
    judged = replay(run, 3, other_rule(run, ["recipe=grpo"], RECIPES)).other
    assert judged is not None and judged.metrics["grad_norm"] > 0
