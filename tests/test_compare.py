"""What a comparison of recipes says of runs that have sampled unlike numbers of tokens."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture
def compare(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "bench"))
    return importlib.import_module("tests.bench.compare")


def test_an_area_at_equal_tokens_ends_inside_of_a_step(compare: ModuleType) -> None:
    outcome = compare.Outcome(
        "row", 0, 0.0, 1.0, [0.2, 0.6, 1.0], 8.0, 1.0, None, tokens=[100.0, 300.0, 100.0]
    )
    assert outcome.area == pytest.approx(0.6)
    assert outcome.area_within(100) == pytest.approx(0.2)
    assert outcome.area_within(200) == pytest.approx((100 * 0.2 + 100 * 0.6) / 200)
    assert outcome.area_within(500) == pytest.approx((20 + 180 + 100) / 500)


def test_a_table_says_what_equal_tokens_give_only_where_they_differ(compare: ModuleType) -> None:
    def outcome(label: str, tokens: float) -> object:
        return compare.Outcome(label, 0, 0.0, 1.0, [0.5, 1.0], 8.0, 1.0, None, [tokens, tokens])

    rows = [compare.Row(label, "grpo") for label in ("plain", "probed")]
    alike = compare.markdown(rows, [outcome("plain", 500), outcome("probed", 600)])
    assert "equal tokens" not in alike
    unlike = compare.markdown(rows, [outcome("plain", 500), outcome("probed", 9500)])
    plain, probed = unlike.splitlines()[2:]
    assert "| 75.0 [75.0, 75.0] | 75.0 [75.0, 75.0] | 500 |" in plain
    assert "| 75.0 [75.0, 75.0] | 50.0 [50.0, 50.0] | 9,500 |" in probed
    assert [line.count("|") for line in unlike.splitlines()] == [10] * 4
