"""How a benchmark row is judged: by its median, its target, its baseline and its own noise."""

from __future__ import annotations

import importlib
import json
from asyncio import CancelledError
from pathlib import Path

import pytest

from common.config.sections import Config, EnvironmentConfig
from tests.bench.harness import Row, ratio_of_times

PLAYED = ("a1", "a2", "b1", "b2", "c1")
"""Runs by name; the letter is their environment."""


def row(*ratios: float, target: float = 1.0, higher: bool = True, failure: str = "") -> Row:
    return Row("name", "other", list(ratios), target, higher, failure=failure)


def test_a_row_holds_by_its_median_in_the_direction_it_names() -> None:
    assert row(0.2, 1.1, 5.0).meets_target()
    assert not row(0.2, 0.9, 5.0).meets_target()
    assert row(0.2, 0.9, 5.0, higher=False).meets_target()
    assert not row(1.1, 1.1, higher=False).meets_target()


def test_a_row_without_a_figure_never_holds() -> None:
    assert not row(failure="no interpreter").meets_target()
    assert not row(failure="no interpreter").regressed(2.0)


@pytest.mark.parametrize("higher", [True, False])
def test_a_tenth_below_the_baseline_fails_unless_the_repeats_are_that_noisy(higher: bool) -> None:
    worse = 0.85 if higher else 1.18
    assert row(worse, worse, worse, higher=higher).regressed(1.0)
    assert not row(1.0, 1.0, 1.0, higher=higher).regressed(1.0)
    assert not row(worse - 0.2, worse, worse + 0.2, higher=higher).regressed(1.0)
    assert not row(worse, higher=higher).regressed(None)


def test_times_are_taken_in_turns_and_the_warm_up_does_not_count() -> None:
    now, order = [0.0], []

    def spend(name: str, seconds: list[float]) -> None:
        order.append(name)
        now[0] += seconds.pop(0)

    mine, theirs = [100.0, 2.0, 3.0], [100.0, 1.0, 1.0]
    ratios, ours, other = ratio_of_times(
        lambda: spend("a", mine), lambda: spend("b", theirs), 2, lambda: now[0]
    )
    assert order == ["a", "b"] * 3
    assert (ratios, ours, other) == ([2.0, 3.0], 2.5, 1.0)


def test_rows_measured_alone_replace_their_own_and_leave_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "bench"))
    bench = importlib.import_module("tests.bench.bench")
    monkeypatch.setattr(bench, "RESULTS", tmp_path)

    def named(name: str, value: float) -> Row:
        return Row(name, "other", [value], 1.0, True)

    failed = Row("script", "", [], 0.0, True, failure="no message")
    bench.keep("any", {}, [named("a", 1.0), named("b", 0.5), failed], 60.0, [])
    bench.keep("any", {}, [named("b", 2.0)], 60.0, ["script"])
    kept = json.loads((tmp_path / "bench-any.json").read_text())
    assert {row["name"]: row["ratios"] for row in kept["rows"]} == {"a": [1.0], "b": [2.0]}
    assert "2 of 2 rows hold, after 1 minutes" in (tmp_path / "bench-any.md").read_text()
    bench.keep("any", {}, [named("d", 1.0)], 60.0, ["another"])
    assert "3 of 3 rows hold, after 2 minutes" in (tmp_path / "bench-any.md").read_text()
    bench.keep("any", {}, [named("c", 1.0)], 60.0, [])
    assert "1 of 1 rows hold" in (tmp_path / "bench-any.md").read_text()


def test_the_last_line_counts_a_row_behind_its_baseline_as_not_holding(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "bench"))
    bench = importlib.import_module("tests.bench.bench")
    rows = [Row("a", "other", [2.0], 1.0, True), Row("b", "other", [1.5], 1.0, True)]
    last = bench.summary(rows, {"a": 2.0, "b": 2.0}, 60.0)
    assert last == "1 of 2 rows hold, after 1 minutes; fallen behind their baseline: b"


@pytest.mark.parametrize("ends", ["with a checkpoint", "at once"])
def test_a_comparison_that_is_told_to_stop_begins_no_other_run(
    ends: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "bench"))
    compare = importlib.import_module("tests.bench.compare")
    configs = [Config(name=name, environment=EnvironmentConfig(name=name[0])) for name in PLAYED]
    begun: list[str | None] = []

    def train_each(runs: list[Config]) -> None:
        for run in runs:
            begun.append(run.name)
            if run.name == "b1" and ends == "at once":
                raise CancelledError
            if run.name == "b1":
                return

    monkeypatch.setattr(compare, "train_each", train_each)
    monkeypatch.setattr(compare, "is_finished", lambda c: c.name in begun and c.name != "b1")
    with pytest.raises(SystemExit, match="143"):
        compare.train(configs)
    assert begun == ["a1", "a2", "b1"]
