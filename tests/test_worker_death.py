"""A worker of pytest-xdist that dies leaves its stacks in the output of the tests."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SPEED = 100
"""The project's deadlines are divided by it, so their order is what is tested."""


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("time.sleep(60)", "Timeout ("),
        ("os.abort()", "Fatal Python error: Aborted"),
    ],
)
def test_it_leaves_its_stacks(how: str, said: str, tmp_path: Path) -> None:
    options = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    keys = ("timeout", "faulthandler_timeout")
    lines = [
        "[pytest]",
        f"timeout_method = {options['timeout_method']}",
        *(f"{key} = {options[key] / SPEED}" for key in keys),
    ]
    (tmp_path / "pytest.ini").write_text("\n".join(lines))
    (tmp_path / "test_it.py").write_text(
        f"import os, time\n\ndef the_culprit():\n    {how}\n\ndef test_it():\n    the_culprit()\n"
    )
    words = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-n", "1", str(tmp_path)]
    done = subprocess.run(
        words, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert "worker 'gw0' crashed while running 'test_it.py::test_it'" in done.stdout
    assert said in done.stderr
    assert "in the_culprit" in done.stderr
