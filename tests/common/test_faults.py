"""The points where tests break processes: quiet without them, once with them, all in use."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from source_tree import PACKAGES, ROOT, sources

from common.supervision.faults import MARK, POINTS, VARIABLE, reached


@pytest.fixture(autouse=True)
def _mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MARK, str(tmp_path / "mark"))
    monkeypatch.setattr("common.supervision.faults._reached", Counter())


def test_nothing_happens_in_production(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert not reached("no such point, and nobody looks")


def test_a_fault_happens_at_its_count_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "spoil@weights received#2,spoil@log appended")
    seen = [reached("weights received") for _ in range(4)]
    assert seen == [False, True, False, False]
    assert reached("log appended")


def test_a_misspelt_point_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "kill@step begin")
    with pytest.raises(ValueError, match="step begin"):
        reached("step begins")


def test_kill_is_a_kill(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "kill@step begins")
    code = "from common.supervision.faults import reached; reached('step begins'); print('alive')"
    for expected in (-9, 0):  # started again, it does not break again
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False)
        assert done.returncode == expected


def test_every_point_is_reached_at_one_place() -> None:
    used = [
        point
        for package in PACKAGES
        for path in sources(package)
        for point in re.findall(r'reached\("([^"]+)"\)', path.read_text())
    ]
    assert sorted(used) == sorted(POINTS)


def test_the_table_of_faults_is_that_of_the_tests() -> None:
    from fault_table import PAGE, with_table

    text = PAGE.read_text()
    assert with_table(text) == text, "run `python tests/support/fault_table.py`"
