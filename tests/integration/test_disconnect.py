"""Leaving a Ray that hangs: its shutdown waits for the raylet without a deadline, ours does not."""

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
