"""Leaving Ray: when it hangs, though its shutdown waits without a deadline, and with all logs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from run_process import run_python

from deploy.run import actors as cluster

HANG = """
import os, signal, sys
from pathlib import Path
import ray
from common.supervision.stacks import descendants
from deploy.run import actors as cluster
ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
cluster._LET_GO_S = 2.0
(raylet,) = [p.pid for p in descendants(os.getpid()) if p.name.startswith("raylet")]
os.kill(raylet, signal.SIGSTOP)
cluster.disconnect(Path(sys.argv[1]))
print("left", sorted(p.name for p in descendants(os.getpid())))
"""


def test_a_raylet_that_hangs_does_not_hold_the_run(tmp_path: Path) -> None:
    done = run_python("-c", HANG, str(tmp_path / "log"), timeout_s=120)
    assert done.returncode == 0, done.stderr
    assert "left []" in done.stdout


LAST_WORDS = """
import os, sys
from pathlib import Path
import ray
from common.supervision.calls import ask, get_all, start_actor
from deploy.command.presets import CONFIGS, load
from deploy.placement.options import plan_here
from deploy.run import actors as cluster

class Talker:
    def talk(self, lines):
        for line in range(lines):
            print("something to say", line, file=sys.stderr)
        os._exit(1)

config = load(CONFIGS / "tiny.yaml", [])
cluster.connect(config, plan_here(config, []))
try:
    get_all([ask(start_actor(Talker, {"num_cpus": 0}), Talker.talk, 40_000)], 60)
except ray.exceptions.RayActorError:
    pass
cluster.disconnect(Path(sys.argv[1]))
"""


def test_the_last_words_of_a_process_that_dies_at_once_are_kept(tmp_path: Path) -> None:
    done = run_python("-c", LAST_WORDS, str(tmp_path / "log"), timeout_s=120)
    assert done.returncode == 0, done.stderr
    said = "".join(path.read_text() for path in tmp_path.glob("log/worker-*.err"))
    lines = [line for line in said.splitlines() if line.startswith("something")]
    assert lines == [f"something to say {number}" for number in range(40_000)]


def test_a_cluster_of_others_that_hangs_is_left_by_ending(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its servers are not ours to kill."""
    ended: list[int] = []
    killed: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "_exit", ended.append)
    monkeypatch.setattr(os, "kill", lambda pid, how: killed.append((pid, how)))
    monkeypatch.setattr(cluster, "descendants", lambda pid: iter(()))
    cluster._tear_away()
    assert (ended, killed) == ([1], [])
    assert "go on by resume=" in capsys.readouterr().err
