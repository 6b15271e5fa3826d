"""A real engine on CPU runs the compiled norms."""

from __future__ import annotations

import json
from pathlib import Path

from run_process import run_python


def test_every_norm_of_an_engine_on_cpu_is_a_compiled_one() -> None:
    script = Path(__file__).with_name("norms_of_an_engine.py")
    result = run_python(str(script), timeout_s=180)
    assert result.returncode == 0, result.stderr
    used: dict[str, int] = json.loads(result.stdout.splitlines()[-1])
    assert used.pop("tokens") >= 1
    assert set(used) == {"cpu_c"} and used["cpu_c"] > 0
