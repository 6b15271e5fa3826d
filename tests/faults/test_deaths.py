"""Processes of a run die or hang while it goes on: it restarts by itself and ends its steps."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest
from run_process import (
    AGENTS,
    QUICK,
    check_whole,
    finish,
    last_step,
    leftovers,
    process_of,
    start,
    wait_for_step,
)

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1200)]
OF_STATE = ("ray::LearnerRank", "raylet/raylet")
REPLACEABLE = ("ray::Generator", "ray::VerifierWorker", "ray::TrajectoryLogWriter")
STEPS = 80


def strike_all(folder: Path, marks: Sequence[str], how: signal.Signals) -> str:
    """The output of a run in which one process after the other is sent `how`."""
    before = set(psutil.pids())
    run = start(
        *(f"runs_dir={folder.parent}", f"name={folder.name}", f"steps={STEPS}", *QUICK),
        *("restart.limit=6", "restart.backoff_s=0.1", "checkpoint.every=5"),
        *("restart.heartbeat_s=1", "restart.silence_s=15"),  # how a hang is seen
        "generator.group_timeout_s=40",  # and that of Ray itself
    )
    reached = 0
    for mark in marks:
        wait_for_step(run, folder, reached + 2)
        victim = process_of(run, mark)
        assert victim is not None, mark
        os.kill(victim.pid, how)
        time.sleep(3.0)  # struck: what is on record now is behind the next attempt's start
        reached = last_step(folder)
    output = finish(run, 300)
    assert run.returncode == 0, output
    check_whole(folder, STEPS)
    assert leftovers(before, ignored=AGENTS) == []
    return output


def test_a_run_outlives_the_death_of_each_of_its_processes(tmp_path: Path) -> None:
    output = strike_all(tmp_path / "mortal", OF_STATE + REPLACEABLE, signal.SIGKILL)
    assert output.count("all processes start again") == len(OF_STATE), output
    for name in ("generator-0", "verifier-0", "the trajectory log"):
        assert output.count(f"{name} died and starts again") == 1, output


def test_a_run_outlives_the_silence_of_each_of_its_processes(tmp_path: Path) -> None:
    actors = ("ray::LearnerRank", *REPLACEABLE)
    output = strike_all(tmp_path / "silent", (*actors, "raylet/raylet"), signal.SIGSTOP)
    assert output.count("all processes start again") == len(actors) + 1, output
    assert output.count("heartbeat waited 15 s for") >= len(actors), output


def test_a_coordinator_that_stood_still_goes_on(tmp_path: Path) -> None:
    """As after Ctrl-Z and `fg`."""
    folder = tmp_path / "paused"
    run = start(
        *(f"runs_dir={tmp_path}", "name=paused", "steps=20", *QUICK),
        *("restart.heartbeat_s=1", "restart.silence_s=15", "restart.backoff_s=0.1"),
    )
    wait_for_step(run, folder, 3)
    os.kill(run.pid, signal.SIGSTOP)
    time.sleep(40.0)
    os.kill(run.pid, signal.SIGCONT)
    output = finish(run, 300)
    assert run.returncode == 0, output
    assert "start again" not in output
    check_whole(folder, 20)
