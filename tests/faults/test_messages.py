"""Answers to the coordinator that are lost, and answers that are late."""

from __future__ import annotations

import json
from pathlib import Path

import psutil
import pytest
from run_process import AGENTS, QUICK, check_whole, finish, leftovers, start

from common.record.metrics import read_metrics

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1500)]
LOSSY = Path(__file__).with_name("lossy.py")
ANSWERS = [
    "its completions from generator-0",
    "its verdicts from verifier-0",
    "the trajectory log",
    "learner step: rank 0",
    "learner export_weights",
    "update_weights of generator-0",
    "score of generator-0",
    "learner take_checkpoint",
    "learner write_checkpoint",
    "heartbeat: ping of generator-0",
]


def test_a_run_outlives_the_loss_of_every_kind_of_answer(tmp_path: Path) -> None:
    before = set(psutil.pids())
    keys = (*QUICK, f"runs_dir={tmp_path}", "name=run", "steps=60", "restart.heartbeat_s=1")
    process = start(
        *(*keys, "restart.limit=20", "restart.backoff_s=0.1"),
        program=[str(LOSSY), json.dumps({"lose": ANSWERS})],
    )
    output = finish(process, 1300)
    assert process.returncode == 0, output
    assert [line[6:] for line in output.splitlines() if line.startswith("lost: ")] == ANSWERS
    assert output.count("all processes start again") == len(ANSWERS), output
    check_whole(tmp_path / "run", 60)
    assert leftovers(before, ignored=AGENTS) == []


def test_late_answers_change_no_loss_of_a_synchronous_run(tmp_path: Path) -> None:
    keys = (*QUICK, f"runs_dir={tmp_path}", "generator.max_staleness=0", "steps=4")
    losses = []
    for name, late_s in (("punctual", 0.0), ("late", 0.5)):
        process = start(
            *(*keys, f"name={name}"), program=[str(LOSSY), json.dumps({"late_s": late_s})]
        )
        output = finish(process, 280)
        assert process.returncode == 0, output
        assert "start again" not in output
        records = read_metrics(tmp_path / name / "metrics.jsonl")
        losses.append([(r.get("loss/policy"), r.get("reward/mean")) for r in records])
        check_whole(tmp_path / name, 4)
    assert losses[0] == losses[1]
    assert len(set(losses[0])) > 2
