"""The table of ends in tests/README.md names tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
_PART = (TESTS / "README.md").read_text().partition("## Every way an episode ends")[2]
NAMED = sorted(set(re.findall(r"`([\w/]+)::(\w+)`", _PART.partition("\n## ")[0])))


def test_the_table_is_there() -> None:
    assert len(NAMED) > 20


@pytest.mark.parametrize(("file", "name"), NAMED)
def test_a_test_of_the_table_exists(file: str, name: str) -> None:
    assert f"def {name}(" in (TESTS / f"{file}.py").read_text()
