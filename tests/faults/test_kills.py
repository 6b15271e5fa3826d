"""Runs that are killed, and go on: nothing lost, nothing twice, and the same losses."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import psutil
import pytest
from run_process import (
    AGENTS,
    PROGRAM,
    QUICK,
    check_whole,
    finish,
    inspect,
    last_step,
    leftovers,
    run_python,
    start,
    wait_for_step,
)

from common.record.metrics import read_metrics

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]


def kill_at_step(run: Path, step: int, *overrides: str) -> None:
    """Start (or go on with) a run and kill it -9 as soon as `step` is on record."""
    before = set(psutil.pids())
    process = start(*overrides)
    wait_for_step(process, run, step)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=30)
    assert leftovers(before, ignored=AGENTS) == []


def complete(*overrides: str) -> str:
    before = set(psutil.pids())
    process = start(*overrides)
    output = finish(process, 280)
    assert process.returncode == 0, output
    assert leftovers(before) == []
    return output


def test_sigterm_saves_and_a_torn_checkpoint_is_passed_over(tmp_path: Path) -> None:
    """Stopped in an orderly way, its newest checkpoint damaged, then resumed."""
    run, before = tmp_path / "stopped", set(psutil.pids())
    keys = (*QUICK, "checkpoint.every=3", f"runs_dir={tmp_path}")
    process = start("name=stopped", "steps=1000", *keys)
    wait_for_step(process, run, 4)
    process.send_signal(signal.SIGTERM)
    output = finish(process, 90)
    assert process.returncode == 0, output
    assert f"stopped by SIGTERM with a checkpoint; go on by resume={run}" in output
    assert leftovers(before, ignored=AGENTS) == []
    stopped = last_step(run)
    saved = sorted(int(path.name.partition("-")[2]) for path in (run / "checkpoints").iterdir())
    assert saved[-1] == stopped
    status, account = inspect(run)
    assert status == 0, account
    weights = run / "checkpoints" / f"step-{stopped}" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    output = complete(f"resume={run}", f"steps={stopped + 1}", *keys)
    assert f"step-{stopped} is damaged, passed over: model.safetensors is not what" in output
    assert f"resuming from step {saved[-2]}" in output
    assert [r["step"] for r in read_metrics(run / "metrics.jsonl")] == list(range(stopped + 2))
    status, account = inspect(run)
    assert status == 0, account


def test_a_killed_synchronous_run_has_the_losses_of_one_that_was_not(tmp_path: Path) -> None:
    keys = (*QUICK, "generator.max_staleness=0", f"runs_dir={tmp_path}", "steps=6")
    keys += ("algorithm.objective.kl=0.05",)  # the reference outlives the kill too
    complete("name=whole", *keys)
    # Step 5 is trained and lost: the last checkpoint is that of step 4.
    kill_at_step(tmp_path / "torn", 5, "name=torn", *keys)
    status, output = inspect(tmp_path / "torn")
    assert status == 1
    assert "the run was killed; go on with it by resume=" in output
    output = complete(f"resume={tmp_path / 'torn'}", *keys)
    assert "resuming from step 4" in output
    whole, torn = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("whole", "torn")]
    assert [record["step"] for record in torn] == list(range(7))
    for mine, theirs in zip(torn, whole, strict=True):
        for key in mine:
            if key.startswith(("loss/", "grad_norm", "reward/", "tokens/trained")):
                assert mine[key] == theirs[key], (mine["step"], key)
    assert torn[-1]["loss/kl"] > 0
    for step in (5, 6):  # trained again after the kill
        replayed = run_python(
            *PROGRAM, "replay", str(tmp_path / "torn"), f"--step={step}", timeout_s=200
        )
        assert "all the same, bitwise" in replayed.stdout, replayed.stdout + replayed.stderr
    status, output = inspect(tmp_path / "torn")
    assert status == 0, output


def test_an_asynchronous_run_survives_kills_before_and_after_its_first_checkpoint(
    tmp_path: Path,
) -> None:
    run = tmp_path / "torn"
    keys = (*QUICK, f"runs_dir={tmp_path}", "steps=9")
    kill_at_step(run, 1, "name=torn", *keys)
    kill_at_step(run, 5, f"resume={run}", *keys)
    complete(f"resume={run}", *keys)
    check_whole(run, 9)


def test_what_ray_leaves_after_a_kill_ends_by_itself() -> None:
    assert leftovers(set(), patience_s=120) == []
