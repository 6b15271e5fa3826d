"""kill -9 at every named point of the loop, before and after each change of state.

The points are those of `common.supervision.faults`. The coordinator is the run: killed, it is
resumed, point after point on one run directory. An actor's death is survived by the run itself.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

import psutil
import pytest
from run_process import (
    AGENTS,
    EPISODES,
    PROGRAM,
    QUICK,
    check_whole,
    finish,
    leftovers,
    run_python,
    start,
)

from common.record.metrics import read_metrics
from common.record.trajectory_log import read_log
from common.supervision.faults import MARK, POINTS, VARIABLE
from deploy.inspector.account import account_of
from deploy.run.directory import LEDGER

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1800)]
OF_ACTORS = {
    "completion sampled": 20,
    "weights received": 3,
    "weights half loaded": 3,
    "verdict given": 40,
    "log appended": 30,
    "gradient step done": 9,
    "checkpoint written": 6,
}
"""And the how-many-th time in a process, so that steps are done between two deaths."""
OF_EPISODES = {"turn sampled": 30, "observation received": 30, "episode closed": 15}
"""Points of a generator that plays episodes of several turns, with a how-many-th time too."""
OF_FOLLOW_UPS = ("group followed up",)
"""Points of a coordinator whose groups have several parts."""
OF_THE_COORDINATOR = tuple(
    point for point in POINTS if point not in (*OF_ACTORS, *OF_EPISODES, *OF_FOLLOW_UPS)
)


def faulty(fault: str, mark: Path, *overrides: str):
    os.environ[VARIABLE], os.environ[MARK] = fault, str(mark)
    try:
        return start(*overrides)
    finally:
        del os.environ[VARIABLE], os.environ[MARK]


def test_the_coordinator_killed_at_every_point(tmp_path: Path) -> None:
    run, before = tmp_path / "run", set(psutil.pids())
    keys = (*QUICK, f"runs_dir={tmp_path}", "steps=40")
    name = "name=run"
    for point in OF_THE_COORDINATOR:
        # The third time, so that a step or two is done first; checkpoints come every other step.
        count = 1 if "checkpoint" in point or "cut" in point else 3
        fault = f"kill@{point}#{count}"
        process = faulty(fault, tmp_path / "mark", name, *keys)
        output = finish(process, 240)
        assert process.returncode == -signal.SIGKILL, (point, output)
        assert leftovers(before, ignored=AGENTS) == [], point
        name = f"resume={run}"
    done = max(r["step"] for r in read_metrics(run / "metrics.jsonl"))
    process = start(name, *keys, f"steps={int(done) + 2}")
    output = finish(process, 240)
    assert process.returncode == 0, output
    check_whole(run, int(done) + 2)
    assert leftovers(before, ignored=AGENTS) == []


def test_actors_killed_at_every_point(tmp_path: Path) -> None:
    run, before = tmp_path / "run", set(psutil.pids())
    faults = ",".join(f"kill@{point}#{count}" for point, count in OF_ACTORS.items())
    keys = (*QUICK, f"runs_dir={tmp_path}", "name=run", "steps=24", "restart.limit=20")
    process = faulty(faults, tmp_path / "mark", *keys, "restart.backoff_s=0.1")
    output = finish(process, 900)
    assert process.returncode == 0, output
    happened = {path.name for path in tmp_path.glob("mark.*")}
    assert len(happened) == len(OF_ACTORS), (happened, output)
    check_whole(run, 24)
    assert leftovers(before, ignored=AGENTS) == []


def test_generators_killed_at_every_point_of_an_episode(tmp_path: Path) -> None:
    """The groups that they played are played again, from their first turn."""
    run, before = tmp_path / "run", set(psutil.pids())
    faults = ",".join(f"kill@{point}#{count}" for point, count in OF_EPISODES.items())
    keys = (*QUICK, *EPISODES, f"runs_dir={tmp_path}", "name=run", "steps=8", "restart.limit=20")
    process = faulty(faults, tmp_path / "mark", *keys, "restart.backoff_s=0.1")
    output = finish(process, 600)
    assert process.returncode == 0, output
    happened = {path.name for path in tmp_path.glob("mark.*")}
    assert len(happened) == len(OF_EPISODES), (happened, output)
    check_whole(run, 8)
    turns = [row for batch in read_log(run / "trajectories") for row in batch["turns"].to_pylist()]
    assert max(map(len, turns)) > 1
    assert leftovers(before, ignored=AGENTS) == []


NEEDS = {
    "rgr_grpo": (
        "verifier.rules=[{name: rubric, args: {criteria: ["
        "{text: 'is {answer}', pattern: '(^|[= ]){answer}$'}, {text: 'is long', pattern: ';;'}]}}]",
        "algorithm.rollout.follow_up.template='{draft} {feedback} {prompt}'",
        "algorithm.rollout.follow_up.feedback_tokens=32",
    ),
}
"""What recipes need besides; the last criterion never holds, so that every group is helped."""


@pytest.mark.parametrize("recipe", ["igrpo", "spo_chain", "rgr_grpo"])
def test_a_run_killed_between_the_parts_of_its_groups_loses_none(
    tmp_path: Path, recipe: str
) -> None:
    """Its generator dies in the second part, then the run before it; a step of it is replayed."""
    run, before = tmp_path / "run", set(psutil.pids())
    keys = (*QUICK, f"recipe={recipe}", f"runs_dir={tmp_path}", "steps=6", "restart.backoff_s=0.1")
    keys += NEEDS.get(recipe, ())
    faults = "kill@completion sampled#9,kill@group followed up#20"
    process = faulty(faults, tmp_path / "mark", "name=run", *keys)
    output = finish(process, 300)
    assert process.returncode == -signal.SIGKILL, output
    assert len(list(tmp_path.glob("mark.*"))) == 2, output
    assert leftovers(before, ignored=AGENTS) == []
    process = start(f"resume={run}", *keys)
    output = finish(process, 300)
    assert process.returncode == 0, output
    check_whole(run, 6)
    aside = {"spo_chain": "probe", "igrpo": "draft"}.get(recipe)
    assert aside is None or account_of(run / LEDGER).completions[aside] > 0
    if recipe == "rgr_grpo":
        for group in read_log(run / "trajectories"):
            assert group.column("part").to_pylist() == [""] * 7 + ["joins"]
            assert group.column("sampled_behind").to_pylist()[-1] != []
    assert leftovers(before, ignored=AGENTS) == []
    replayed = run_python(*PROGRAM, "replay", str(run), "--step=6", timeout_s=200)
    assert "all the same, bitwise" in replayed.stdout, replayed.stdout + replayed.stderr


def test_a_damaged_bucket_is_sent_again(tmp_path: Path) -> None:
    run = tmp_path / "run"
    keys = (*QUICK, f"runs_dir={tmp_path}", "name=run", "steps=4", "restart.limit=0")
    process = faulty("spoil@weights received#3", tmp_path / "mark", *keys)
    output = finish(process, 240)
    assert process.returncode == 0, output
    resends = [r.get("publish/resends", 0) for r in read_metrics(run / "metrics.jsonl")]
    assert resends == [0, 0, 1, 0, 0], output  # the first time is version 0
    check_whole(run, 4)
