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
from run_process import AGENTS, QUICK, check_whole, finish, leftovers, start

from common.record.metrics import read_metrics
from common.supervision.faults import MARK, POINTS, VARIABLE

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
OF_THE_COORDINATOR = tuple(point for point in POINTS if point not in OF_ACTORS)


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


def test_a_damaged_bucket_is_sent_again(tmp_path: Path) -> None:
    run = tmp_path / "run"
    keys = (*QUICK, f"runs_dir={tmp_path}", "name=run", "steps=4", "restart.limit=0")
    process = faulty("spoil@weights received#2", tmp_path / "mark", *keys)
    output = finish(process, 240)
    assert process.returncode == 0, output
    resends = [r.get("publish/resends", 0) for r in read_metrics(run / "metrics.jsonl")]
    assert resends == [0, 0, 1, 0, 0], output
    check_whole(run, 4)
