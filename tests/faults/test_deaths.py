"""Processes of a run die or hang while it goes on: it restarts by itself and ends its steps."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
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

from common.record.credit_log import read_scores
from deploy.models.resolve import resolve_model

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1200)]
OF_STATE = ("ray::LearnerRank", "raylet/raylet")
REPLACEABLE = ("ray::Generator", "ray::VerifierWorker", "ray::TrajectoryLogWriter")
STEPS = 80


def strike_all(folder: Path, marks: Sequence[str], how: signal.Signals) -> tuple[str, int]:
    """Send one process of a run after the other `how`.

    Returns the output, and how often Ray ended the driver with a raylet: its client of the object
    store exits where it finds the store gone, before anybody is told. The run is then gone on with.
    """
    before = set(psutil.pids())
    asked = (
        *(f"runs_dir={folder.parent}", f"name={folder.name}", f"steps={STEPS}", *QUICK),
        *("restart.limit=6", "restart.backoff_s=0.1", "checkpoint.every=5"),
        *("restart.heartbeat_s=1", "restart.silence_s=15"),  # how a hang is seen
        "generator.group_timeout_s=40",  # and that of Ray itself
    )
    run, reached, outputs, struck = start(*asked), 0, [], ""
    for mark in (*marks, ""):
        deadline = time.monotonic() + 240
        while last_step(folder) < min(reached + 2, STEPS):
            if run.poll() is not None:
                outputs.append(finish(run, 10))
                assert "raylet" in struck and run.returncode == 1, outputs[-1]
                run, struck = start(*asked, "resume=auto"), ""
            assert time.monotonic() < deadline, f"no step {reached + 2}"
            time.sleep(0.02)
        if not mark:
            break
        victim = process_of(run, mark)
        assert victim is not None, mark
        os.kill(victim.pid, how)
        struck = mark
        time.sleep(3.0)  # struck: what is on record now is behind the next attempt's start
        reached = last_step(folder)
    outputs.append(finish(run, 300))
    assert run.returncode == 0, outputs[-1]
    check_whole(folder, STEPS)
    assert leftovers(before, ignored=AGENTS) == []
    return "\n".join(outputs), len(outputs) - 1


def test_a_run_outlives_the_death_of_each_of_its_processes(tmp_path: Path) -> None:
    output, ended = strike_all(tmp_path / "mortal", OF_STATE + REPLACEABLE, signal.SIGKILL)
    assert output.count("all processes start again") + ended == len(OF_STATE), output
    for name in ("generator-0", "verifier-0", "the trajectory log"):
        assert output.count(f"{name} died and starts again") == 1, output


def generators_of(run: subprocess.Popen[str]) -> list[psutil.Process]:
    """Processes that hold a model in vLLM, the one that was started last first."""
    found = []
    for process in psutil.Process(run.pid).children(recursive=True):
        try:
            if "ray::Generator" in " ".join(process.cmdline()[:1]):
                found.append((process.create_time(), process.pid, process))
        except psutil.NoSuchProcess:
            continue
    return [process for _, _, process in sorted(found, reverse=True)]


def test_a_run_outlives_the_death_of_its_teacher(tmp_path: Path) -> None:
    """A teacher has no replacement: all go on from the last checkpoint, every step with its scores.

    From outside its process looks as a generator's does. So they die one after the other, which is
    a replacement for one and a restart for the other.
    """
    before, folder, steps = set(psutil.pids()), tmp_path / "taught", 10
    run = start(
        *(f"runs_dir={tmp_path}", "name=taught", f"steps={steps}", *QUICK, "recipe=opd"),
        *(f"teacher.path={resolve_model('builtin:tiny-chain-sum')}", "teacher.count=1"),
        *("restart.limit=3", "restart.backoff_s=0.1", "restart.heartbeat_s=1"),
        "restart.silence_s=60",
    )
    wait_for_step(run, folder, 3, patience_s=480)  # two engines start
    last, first = generators_of(run)
    os.kill(last.pid, signal.SIGKILL)
    wait_for_step(run, folder, last_step(folder) + 2, patience_s=480)
    if first.is_running():  # the teacher was this one
        os.kill(first.pid, signal.SIGKILL)
    output = finish(run, 600)
    assert run.returncode == 0, output
    assert output.count("all processes start again") == 1, output
    assert re.search(r"waited for .* teacher-0", output), output
    assert "resuming from step" in output.partition("all processes start again")[2], output
    check_whole(folder, steps)
    for step in range(1, steps + 1):
        scores = read_scores(folder, step)
        assert all(np.isfinite(each).all() for each in scores.values())
    assert leftovers(before, ignored=AGENTS) == []


def test_a_run_outlives_the_silence_of_each_of_its_processes(tmp_path: Path) -> None:
    actors = ("ray::LearnerRank", *REPLACEABLE)
    output, ended = strike_all(tmp_path / "silent", (*actors, "raylet/raylet"), signal.SIGSTOP)
    assert not ended
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
