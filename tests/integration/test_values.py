"""`grpo-lambda values` on real parts: interrupted, resumed, added up again, and trained on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import psutil
import pytest
from run_process import PROGRAM, ROOT, finish, leftovers

from actors.verifiers import reasoning_gym
from common.record.metrics import read_metrics
from common.record.trajectory_log import read_log
from deploy.eval.runner import logged
from deploy.eval.values import soft_value
from deploy.launch import train

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]
TINY = ROOT / "deploy/configs/tiny.yaml"
PROMPTS, HELD_OUT, SAMPLES, BETA = 40, 4, 4, 0.5


def call(out: Path) -> subprocess.Popen[str]:
    """Two sequences at a time, so that there is time to interrupt."""
    return subprocess.Popen(
        [
            *(sys.executable, *PROGRAM, "values", "--config", str(TINY), "--out", str(out)),
            *("--samples", str(SAMPLES), "--beta", str(BETA)),
            *("generator.max_concurrent_sequences=2", f"eval.prompts={HELD_OUT}"),
            f"data.reasoning_gym.size={PROMPTS}",
        ],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def values_of_the_log(out: Path) -> dict[str, float]:
    """By question, judged again from the texts alone."""
    rewards: dict[str, list[float]] = defaultdict(list)
    for batch in read_log(out / "trajectories"):
        (row,) = batch.to_pylist()
        verdict = reasoning_gym.score(row["text"], json.loads(row["reference"]))
        assert verdict.reward is not None
        rewards[row["question"]].append(verdict.reward)
    assert all(len(some) == SAMPLES for some in rewards.values())
    return {question: soft_value(some, BETA) for question, some in rewards.items()}


def test_values_are_made_once_and_are_what_a_run_takes_off_its_rewards(tmp_path: Path) -> None:
    before, out, total = set(psutil.pids()), tmp_path / "out", (PROMPTS + HELD_OUT) * SAMPLES
    process = call(out)
    deadline = time.monotonic() + 400
    while len(logged(out / "trajectories")) < 5:
        assert process.poll() is None, finish(process, 10)
        assert time.monotonic() < deadline, "no answer was logged"
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGTERM)
    stopped = finish(process, 60)
    assert process.returncode == 143, stopped
    there = logged(out / "trajectories")
    assert 5 <= len(there) < total
    assert f"44 prompts x 4 answers = {total} answers" in stopped
    assert not (out / "data.jsonl").exists()
    assert leftovers(before) == []

    said = finish(process := call(out), 400)
    assert process.returncode == 0, said
    assert "put a rule before it" in said
    assert f"{len(there)} of {total} answers" in said
    numbers = [batch.column("group_id")[0].as_py() for batch in read_log(out / "trajectories")]
    assert sorted(numbers) == list(range(total))  # none lost, none twice
    found = {
        row["prompt"]: row["v"]
        for row in map(json.loads, (out / "data.jsonl").read_text().splitlines())
    }
    assert found == pytest.approx(values_of_the_log(out))
    assert len(set(found.values())) > 1

    column = {"name": "column", "weight": -1, "args": {"name": "v"}}
    keys = {
        "recipe": "a_star_po",
        "steps": 2,
        "name": "run",
        "runs_dir": tmp_path,
        "batch.group_size": 1,
        "data.source": "file",
        "data.path": out / "data.jsonl",
        "verifier.rules": [{"name": "math_answer", "args": {"extract": "last_number"}}, column],
        "eval.every": 0,
        "eval.prompts": HELD_OUT,
    }
    run = train(TINY, **keys)
    assert any(
        record.get("grad_norm", 0) > 0 for record in read_metrics(run.path / "metrics.jsonl")
    )
    trained = [row for batch in read_log(run.path / "trajectories") for row in batch.to_pylist()]
    assert len(trained) >= 16
    for row in trained:
        assert row["reward"] == pytest.approx(row["accuracy"] - found[row["question"]], abs=1e-6)
