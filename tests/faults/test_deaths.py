"""Processes of a run die or hang while it goes on: it restarts by itself and ends its steps."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import psutil
import pytest
from run_process import (
    AGENTS,
    check_whole,
    finish,
    last_step,
    leftovers,
    process_of,
    start,
    wait_for_step,
)

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1200)]
FAULTS = [
    ("ray::Generator", signal.SIGKILL),
    ("ray::LearnerWorker", signal.SIGKILL),
    ("ray::VerifierWorker", signal.SIGKILL),
    ("ray::TrajectoryStream", signal.SIGKILL),
    ("raylet/raylet", signal.SIGKILL),
    ("ray::Generator", signal.SIGSTOP),
]
STEPS = 100


def test_a_run_outlives_each_of_its_processes(tmp_path: Path) -> None:
    before = set(psutil.pids())
    folder = tmp_path / "mortal"
    run = start(
        *(f"runs_dir={tmp_path}", "name=mortal", f"steps={STEPS}", "checkpoint.every=5"),
        *("eval.every=0", "eval.prompts=16", "learner.credit_probe_every=0"),
        *("restart.limit=6", "restart.backoff_s=0.1"),
        *("generator.group_timeout_s=20", "weights.publish_timeout_s=20"),  # how a hang is seen
    )
    reached = 0
    for mark, how in FAULTS:
        wait_for_step(run, folder, reached + 2)
        victim = process_of(run, mark)
        assert victim is not None, mark
        os.kill(victim.pid, how)
        time.sleep(3.0)  # dead: what is on record now is behind the next attempt's start
        reached = last_step(folder)
    output = finish(run, 300)
    assert run.returncode == 0, output
    assert output.count("all processes start again") == 3, output  # learner, Ray, the hang
    for name in ("generator-0", "verifier-0", "the trajectory stream"):
        assert output.count(f"{name} died and starts again") == 1, output
    check_whole(folder, STEPS)
    assert leftovers(before, ignored=AGENTS) == []
