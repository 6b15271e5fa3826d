"""Runs of a tiny model that plays episodes, on real vLLM: what is in their logs, whatever happens.

The environment is a module of the run's own, in a folder that can be taken away.
"""

from __future__ import annotations

import math
import os
import shutil
import signal
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pytest
from run_process import (
    AGENTS,
    EPISODES,
    PROGRAM,
    QUICK,
    beside,
    check_whole,
    finish,
    last_step,
    leftovers,
    run_python,
    start,
    wait_for_step,
)

from common.record.credit_log import read_credit
from common.record.ledger import reading
from common.record.metrics import read_metrics
from common.record.trajectory_log import read_log
from common.record.turns import check_turns
from common.supervision.faults import MARK, VARIABLE
from deploy.models.resolve import tokenizer_here

pytestmark = [pytest.mark.agents, pytest.mark.timeout(900)]

TURNS, SIZE = 3, 8
KEYS = (
    *(*QUICK, *EPISODES, "eval.prompts=0", "environment.name=own_games:Patient"),
    *(f"environment.max_turns={TURNS}", "environment.turn_tokens=24", "model.max_length=256"),
    *("generator.max_completion_tokens=160", f"batch.group_size={SIZE}", "restart.backoff_s=0.1"),
)
CALM = ("steps=3", "generator.max_staleness=0", "generator.temperature=1.5")
CALM += ("batch.prompts_per_step=1",)


def games(folder: Path) -> Path:
    """A folder with the environment's module."""
    (folder / "modules").mkdir()
    source = Path(__file__).parents[1] / "support/patient_environments.py"
    shutil.copy(source, folder / "modules/own_games.py")
    return folder / "modules"


def run_calmly(folder: Path, **variables: str) -> tuple[Path, Path, str]:
    """A synchronous run of one group a step: its folder, that of its module, what it said."""
    modules, before = games(folder), set(psutil.pids())
    with beside(modules, **variables):
        process = start(*KEYS, *CALM, f"runs_dir={folder}", "name=run")
        output = finish(process, 400)
    assert process.returncode == 0, output
    assert leftovers(before, ignored=AGENTS) == []
    check_whole(folder / "run", 3)
    return folder / "run", modules, output


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    run, modules, _ = run_calmly(tmp_path_factory.mktemp("calm"))
    return run, modules


def rows_of(run: Path) -> list[dict[str, Any]]:
    return [row for batch in read_log(run / "trajectories") for row in batch.to_pylist()]


def check_rows(run: Path) -> list[dict[str, Any]]:
    """Turns are the sampled tokens, versions ascend; the rows."""
    for batch in read_log(run / "trajectories"):
        check_turns(batch)
    rows = rows_of(run)
    for row in rows:
        assert row["weight_versions"] == sorted(row["weight_versions"])
        sampled = [not math.isnan(p) for p in row["behaviour_logprobs"]]
        assert sum(sampled) == sum(turn["end"] - turn["begin"] for turn in row["turns"])
        assert row["loss_mask"] == sampled
    return rows


def test_a_token_of_the_log_is_a_token_that_was_sampled(calm: tuple[Path, Path]) -> None:
    """Decoding and encoding again would change some of these turns. The learner gives what is in
    the log the probability that the engine gave it, so nothing was encoded again."""
    run, _ = calm
    tokenizer = tokenizer_here("builtin:tiny-chain-sum")
    drifted = 0
    for row in check_rows(run):
        assert [turn["finish"] for turn in row["turns"]].count("stop") <= TURNS
        for turn in row["turns"]:
            ids = row["token_ids"][turn["begin"] : turn["end"]]
            text = tokenizer.decode(ids, skip_special_tokens=False)
            drifted += tokenizer.encode(text, add_special_tokens=False) != ids
    assert drifted > 0
    records = read_metrics(run / "metrics.jsonl")[1:]
    assert max(record["logprob_gap/mean"] for record in records) < 1e-4
    assert all(abs(record["is_ratio/mean"] - 1) < 1e-3 for record in records)
    assert all(record["episode/turns"] == TURNS for record in records)


def test_an_episode_of_the_log_is_played_again(calm: tuple[Path, Path]) -> None:
    run, modules = calm
    with beside(modules):
        for episode in ("0/0", "2/7"):
            words = ("replay", str(run), "--episode", episode, "--trust-code")
            done = run_python(*PROGRAM, *words, timeout_s=200)
            assert done.returncode == 0, done.stdout + done.stderr
            assert "all observations, rewards and states are the same" in done.stdout


def test_a_killed_generator_in_turn_two_loses_nothing(
    calm: tuple[Path, Path], tmp_path: Path
) -> None:
    """One group is under way, and no episode ends with its first turn. So the turn that is sampled
    after as many as there are episodes is a second one."""
    fault = {VARIABLE: f"kill@turn sampled#{SIZE + 1}", MARK: str(tmp_path / "mark")}
    run, _, output = run_calmly(tmp_path, **fault)
    assert len(list(tmp_path.glob("mark.*"))) == 1
    assert output.count("generator-0 died and starts again") == 1, output
    with reading(run / "ledger.sqlite") as db:
        trained = db.execute("SELECT group_id, again FROM groups WHERE step NOT NULL").fetchall()
    assert trained == [(0, 0), (1, 0), (2, 0)], "the group of the dead generator is no other one"
    mine, theirs = (rows_of(each) for each in (run, calm[0]))
    assert [row["token_ids"] for row in mine] == [row["token_ids"] for row in theirs]
    for a, b in zip(
        *(read_metrics(each / "metrics.jsonl") for each in (run, calm[0])), strict=True
    ):
        for key in a:
            if key.startswith(("loss/", "grad_norm", "reward/", "tokens/trained")):
                assert a[key] == b[key], (a["step"], key)


def test_a_step_is_replayed_without_the_environments_module(calm: tuple[Path, Path]) -> None:
    """Bitwise, and with nobody's trust: nothing of the environment runs."""
    run, modules = calm
    shutil.rmtree(modules)
    for step in (2, 3):
        done = run_python(*PROGRAM, "replay", str(run), f"--step={step}", timeout_s=300)
        assert "all the same, bitwise" in done.stdout, done.stdout + done.stderr
        assert done.returncode == 0
    words = ("replay", str(run), "--episode", "0/0", "--trust-code")
    done = run_python(*PROGRAM, *words, timeout_s=200)
    assert done.returncode == 2
    assert "No module named 'own_games'" in done.stderr


@pytest.fixture(scope="module")
def busy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose environments take their time; an episode's process is killed, then a worker."""
    folder, before = tmp_path_factory.mktemp("busy"), set(psutil.pids())
    run = folder / "run"
    with beside(games(folder)):
        process = start(
            *(*KEYS, f"runs_dir={folder}", "name=run", "steps=8", "generator.max_staleness=1"),
            *("environment.args={seconds: 1.5}", "batch.prompts_per_step=4"),
        )
    wait_for_step(process, run, 1)
    os.kill(players(process.pid)[0].pid, signal.SIGKILL)
    wait_for_step(process, run, last_step(run) + 2)
    worker = players(process.pid)[0].parent()
    assert worker is not None
    os.kill(worker.pid, signal.SIGKILL)
    output = finish(process, 400)
    assert process.returncode == 0, output
    assert leftovers(before, ignored=AGENTS) == []
    return run


def players(run: int) -> list[psutil.Process]:
    """Processes of episodes below a run: they were forked by a worker that looks the same."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        found = []
        for process in psutil.Process(run).children(recursive=True):
            try:
                above = process.parent()
                line = process.cmdline()
                if "actors.environments.child" in line and above and above.cmdline() == line:
                    found.append(process)
            except psutil.NoSuchProcess:
                continue
        if found:
            return found
        time.sleep(0.02)
    raise AssertionError("no episode is being played")


def test_slow_environments_keep_the_staleness_bound(busy: Path) -> None:
    check_whole(busy, 8)
    assert max(r["staleness/max"] for r in read_metrics(busy / "metrics.jsonl")[1:]) == 1
    assert all(r["episode/environment_s"] > 0 for r in read_metrics(busy / "metrics.jsonl")[1:])


def test_weights_change_between_turns_and_inside_of_one(busy: Path) -> None:
    inside = between = 0
    for row in check_rows(busy):
        versions = [
            row["weight_versions"][turn["begin"] : turn["end"]]
            for turn in row["turns"]
            if turn["end"] > turn["begin"]
        ]
        inside += any(of_turn[0] < of_turn[-1] for of_turn in versions)
        between += any(one[-1] < other[0] for one, other in pairwise(versions))
    assert inside > 0
    assert between > 0


def test_a_killed_environment_is_no_reward_and_the_others_are_trained(busy: Path) -> None:
    rows = rows_of(busy)
    failed = [row for row in rows if row["environment_verdict"] == "error"]
    reasons = [row["environment_reason"] for row in failed]
    assert sum("its process ended: signal SIGKILL" in reason for reason in reasons) == 1, reasons
    assert sum("its worker ended" in reason for reason in reasons) >= 1, reasons
    assert all("its process ended" in reason or "its worker" in reason for reason in reasons)
    assert {row["reward"] for row in failed} == {row["environment_reward"] for row in failed}
    assert {row["reward"] for row in failed} == {None}
    with reading(busy / "ledger.sqlite") as db:
        step_of = dict(db.execute("SELECT group_id, step FROM groups WHERE step NOT NULL"))
    alone = next(row for row in failed if "signal SIGKILL" in row["environment_reason"])
    credit = read_credit(busy, step_of[alone["group_id"]]).to_pylist()
    of_group = {r["completion_index"]: r for r in credit if r["group_id"] == alone["group_id"]}
    others = [row for index, row in of_group.items() if index != alone["completion_index"]]
    assert len(others) == SIZE - 1
    assert any(row["trained"] and row["advantage"] for row in others)
    mine = of_group.get(alone["completion_index"])
    assert mine is None or not mine["trained"]
