"""`deploy/examples/loop.py`, run as its first lines say."""

from __future__ import annotations

import re
from statistics import mean

from run_process import run_python


def test_the_loop_learns() -> None:
    done = run_python("deploy/examples/loop.py", timeout_s=280)
    assert done.returncode == 0, done.stderr
    rewards = [float(found) for found in re.findall(r"reward ([0-9.]+)", done.stdout)]
    assert len(rewards) == 60
    assert mean(rewards[-10:]) > mean(rewards[:10]) + 0.1, rewards
