"""Runs that are killed, and go on: nothing lost, nothing twice, and the same losses."""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path

import psutil
import pytest
from run_process import (
    AGENTS,
    GUESS,
    PROGRAM,
    QUICK,
    TINY,
    beside,
    check_whole,
    finish,
    inspect,
    last_step,
    leftovers,
    run_python,
    start,
    wait_for_step,
)

from common.record.ledger import reading
from common.record.metrics import read_metrics
from common.record.trajectory_log import read_log
from deploy.run.directory import LEDGER

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]


def kill_at_step(run: Path, step: int, *overrides: str) -> None:
    """Start (or go on with) a run and kill it -9 once `step` is on record and a group is open."""
    before = set(psutil.pids())
    process = start(*overrides)
    wait_for_step(process, run, step)
    while not has_open_groups(run):
        assert process.poll() is None, finish(process, 10)
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=30)
    assert leftovers(before, ignored=AGENTS) == []


def has_open_groups(run: Path) -> bool:
    """Whether the ledger has a group that is not closed: what a kill leaves behind."""
    with reading(run / LEDGER) as ledger:
        found = ledger.execute("SELECT 1 FROM groups WHERE state != 'closed' LIMIT 1").fetchone()
    return found is not None


def complete(*overrides: str, preset: Path = TINY) -> str:
    before = set(psutil.pids())
    process = start(*overrides, preset=preset)
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


SCAFFOLD = (
    "recipe=ruscarl",
    "verifier.rules=[{name: rubric, args: {criteria: ["
    "{text: 'is {answer}', pattern: '(^|[= ]){answer}$'}, {text: 'has steps', pattern: ';'}]}}]",
    "algorithm.rollout.scaffold.template='{rubric} {prompt}'",
    "algorithm.rollout.scaffold.midpoint=0.8",
    "algorithm.rollout.scaffold.steepness=5",
)
"""Another rubric for each completion, and for each step."""


@pytest.mark.parametrize("more", [(), SCAFFOLD], ids=["plain", "scaffold"])
def test_a_killed_synchronous_run_has_the_losses_of_one_that_was_not(
    tmp_path: Path, more: tuple[str, ...]
) -> None:
    keys = (*QUICK, "generator.max_staleness=0", f"runs_dir={tmp_path}", "steps=6", *more)
    keys += ("algorithm.objective.kl=0.05",)  # the reference outlives the kill too
    complete("name=whole", *keys)
    # Step 5 is trained and lost: the last checkpoint is that of step 4.
    kill_at_step(tmp_path / "torn", 5, "name=torn", *keys)
    status, output = inspect(tmp_path / "torn")
    assert status == 1
    assert "the run was killed; go on with it by resume=" in output
    output = complete(f"resume={tmp_path / 'torn'}", *keys)
    assert "resuming from step 4" in output
    check_same_losses(tmp_path / "torn", tmp_path / "whole", 6)
    assert read_metrics(tmp_path / "torn" / "metrics.jsonl")[-1]["loss/kl"] > 0
    for step in (5, 6):  # trained again after the kill
        replayed = run_python(
            *PROGRAM, "replay", str(tmp_path / "torn"), f"--step={step}", timeout_s=200
        )
        assert "all the same, bitwise" in replayed.stdout, replayed.stdout + replayed.stderr
    status, output = inspect(tmp_path / "torn")
    assert status == 0, output


def check_same_losses(run: Path, other: Path, steps: int) -> None:
    mine, theirs = (read_metrics(each / "metrics.jsonl") for each in (run, other))
    assert [record["step"] for record in mine] == list(range(steps + 1))
    for a, b in zip(mine, theirs, strict=True):
        for key in a:
            if key.startswith(("loss/", "grad_norm", "reward/", "tokens/trained")):
                assert a[key] == b[key], (a["step"], key)


@pytest.mark.parametrize("kind", ["environment", "command"])
def test_a_killed_run_of_episodes_has_the_losses_of_one_that_was_not(
    tmp_path: Path, kind: str
) -> None:
    """Killed while episodes are played: none of them outlives it, and none is lost."""
    modules = tmp_path / "modules"
    modules.mkdir()
    shutil.copy(Path(__file__).parents[1] / "support/odd_agents.py", modules / "own_agents.py")
    agent = f"environment.command=[python, {modules / 'own_agents.py'}, plays]"
    keys = (*QUICK, "generator.max_staleness=0", "steps=6", f"runs_dir={tmp_path}")
    keys += ("eval.prompts=0", "batch.prompts_per_step=2", "batch.group_size=4")
    keys += ("environment.name=null", agent) if kind == "command" else ()
    with beside(modules):
        complete("name=whole", *keys, preset=GUESS)
        assert wait_until_none_plays(modules) == []
        run, before = tmp_path / "torn", set(psutil.pids())
        process = start("name=torn", *keys, preset=GUESS)
        wait_for_step(process, run, 3)
        while not playing(modules):
            assert process.poll() is None, finish(process, 10)
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate(timeout=30)
        assert wait_until_none_plays(modules) == []
        assert leftovers(before, ignored=AGENTS) == []
        assert inspect(run)[0] == 1
        output = complete(f"resume={run}", *keys, preset=GUESS)
    assert "resuming from step " in output
    assert wait_until_none_plays(modules) == []
    check_whole(run, 6)
    check_same_losses(run, tmp_path / "whole", 6)
    rows = [row for batch in read_log(run / "trajectories") for row in batch.to_pylist()]
    assert len({row["reward"] for row in rows} - {None}) > 1
    assert any(record["grad_norm"] > 0 for record in read_metrics(run / "metrics.jsonl")[1:])


def playing(modules: Path) -> list[str]:
    """Processes of environments and agents whose files are in this folder, or that may read it."""
    lines = [
        " ".join(process.info["cmdline"] or ())
        for process in psutil.process_iter(["cmdline"])
        if process.pid != os.getpid()
    ]
    kinds = ("actors.environments.child", "actors.endpoint.keeper", "own_agents.py")
    return [line for line in lines if str(modules) in line and any(kind in line for kind in kinds)]


def wait_until_none_plays(modules: Path) -> list[str]:
    deadline = time.monotonic() + 20
    while (found := playing(modules)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return found


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
