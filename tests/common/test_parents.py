"""Nothing below an actor outlives it, whoever stands between."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

ACTOR = """
import os, subprocess, sys
os.environ["GRPO_LAMBDA_ACTOR_PID"] = str(os.getpid())
engine = subprocess.Popen([sys.executable, "-c", sys.argv[1], *sys.argv[2:]])
engine.wait()
"""
ENGINE = """
import subprocess, sys
workers = [subprocess.Popen([sys.executable, "-c", sys.argv[1], sys.argv[2], n]) for n in "01"]
for worker in workers: worker.wait()
"""
"""As vLLM's: it knows nothing of us, and waits for its workers."""
WORKER = """
import os, pathlib, sys, time
from common.supervision.parents import die_with_parent
die_with_parent()
place = pathlib.Path(sys.argv[1], sys.argv[2])
place.with_suffix(".partial").write_text(f"{os.getpid()} {os.getppid()}")
place.with_suffix(".partial").rename(place)
time.sleep(60)
"""
_WITHIN_S = 20.0


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def until(true: object, what: str) -> None:
    ends = time.monotonic() + _WITHIN_S
    while not true():  # type: ignore[operator]
        assert time.monotonic() < ends, what
        time.sleep(0.05)


@pytest.mark.parametrize("killed", ["actor", "engine"])
def test_no_engine_and_no_worker_is_left(killed: str, tmp_path: Path) -> None:
    """The actor is killed as Ray kills it: nothing of its own runs any more."""
    chain = [sys.executable, "-c", ACTOR, ENGINE, WORKER, str(tmp_path)]
    actor = subprocess.Popen(chain, cwd=Path(__file__).resolve().parents[2])
    pids: list[int] = []
    try:
        until(lambda: all((tmp_path / n).exists() for n in "01"), "the workers did not start")
        (first, engine), (second, _) = (map(int, (tmp_path / n).read_text().split()) for n in "01")
        pids = [engine, first, second]
        os.kill(actor.pid if killed == "actor" else engine, signal.SIGKILL)
        until(lambda: not any(map(alive, pids)), f"{pids} outlived the {killed}")
    finally:
        actor.kill()
        actor.wait()
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
