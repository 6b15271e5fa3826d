"""A run whose first version cannot be proved ends there, once, with a user's error."""

from __future__ import annotations

from pathlib import Path

import psutil
from run_process import finish, leftovers, start


def test_a_model_computed_otherwise_is_refused_once_and_nothing_is_left(tmp_path: Path) -> None:
    """No two engines round alike, so a tolerance of nothing stands for another architecture."""
    before = set(psutil.pids())
    process = start(f"runs_dir={tmp_path}", "name=run", "steps=4", "weights.canary_tolerance=1e-12")
    output = finish(process, 240)
    assert process.returncode == 2, output
    assert "have read the same folder" in output
    assert "start again in" not in output
    assert leftovers(before) == []
