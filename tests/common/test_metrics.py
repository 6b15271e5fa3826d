"""Metrics: the record is the contract; no sink can end, hold or garble a run."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from metric_doubles import Memory, fail
from mounts import remount, small_disk

from common.errors import RunError
from common.record.metrics import (
    DROPPED,
    IsolatedSink,
    Metrics,
    MetricSink,
    flatten,
    read_metrics,
    summarize,
)


class Bench:
    """`Metrics` over sinks by name, with what was said."""

    def __init__(self, folder: Path, timeout_s: float = 5.0, capacity: int = 256) -> None:
        self.said: list[str] = []
        self.path = folder / "metrics.jsonl"
        self._timeout_s, self._capacity = timeout_s, capacity

    def over(self, **sinks: MetricSink | Callable[[], MetricSink]) -> Metrics:
        contained = [
            IsolatedSink(
                name,
                sink if callable(sink) else lambda sink=sink: sink,
                self._timeout_s,
                self.said.append,
                self._capacity,
            )
            for name, sink in sinks.items()
        ]
        return Metrics(self.path, contained, timeout_s=self._timeout_s)


def run(metrics: Metrics, steps: int) -> float:
    """Seconds that the run itself spent on its records."""
    with metrics:
        started = time.monotonic()
        for step in range(steps):
            metrics.write(step, {"reward/mean": step / 10, "time/step": 2.0})
        return time.monotonic() - started


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_every_sink_has_every_record_in_order_and_the_summary(tmp_path: Path) -> None:
    bench, one, other = Bench(tmp_path), Memory(), Memory()
    run(bench.over(one=one, other=other), 20)
    written = [(int(r.pop("step")), r) for r in read_metrics(bench.path)]
    assert one.records == other.records == written
    assert [step for step, _ in written] == list(range(20))
    summary = {"steps": 19, "reward": 1.9, "tokens_generated": 0, "seconds": 40}
    assert one.end == ({f"summary/{key}": value for key, value in summary.items()}, False)
    assert bench.said == []


@pytest.mark.parametrize("error", [OSError("no route to host"), SystemExit(3), KeyError()])
def test_a_sink_that_raises_is_switched_off_once_and_counted(
    tmp_path: Path, error: BaseException
) -> None:
    bench, bad, good = Bench(tmp_path), Memory({3: fail(error)}), Memory()
    metrics = bench.over(bad=bad, good=good)
    with metrics:
        for step in range(10):
            metrics.write(step, {})
            if step == 3:
                until(lambda: bool(bench.said))
    assert bad.steps == [0, 1, 2]
    assert bad.end is None
    assert good.steps == list(range(10))
    (line,) = bench.said
    assert line.startswith(f"warning: metrics sink bad is switched off: {type(error).__name__}")
    assert str(error) in line
    # Known at step 4: step 3 is lost; at step 5: 3 and 4; and so on.
    dropped = [record[DROPPED] for record in read_metrics(bench.path)]
    assert dropped == [0, 0, 0, 0, 1, 2, 3, 4, 5, 6]


def test_a_sink_that_cannot_be_opened_costs_its_records_alone(tmp_path: Path) -> None:
    bench, good = Bench(tmp_path), Memory()
    run(bench.over(bad=fail(ValueError("no such project\nsecond line")), good=good), 5)
    assert good.steps == list(range(5))
    (line,) = bench.said
    assert "bad is switched off: ValueError: no such project (" in line


@pytest.mark.parametrize("place", ["opening", "a record", "closing"])
def test_a_sink_that_hangs_holds_the_run_for_its_deadline_at_most(
    tmp_path: Path, place: str
) -> None:
    never = threading.Event()
    bench, good = Bench(tmp_path, timeout_s=0.3), Memory()
    hanging = Memory({{"a record": 1, "closing": -1}.get(place, -2): never.wait})

    def opened() -> MetricSink:
        if place == "opening":
            never.wait()
        return hanging

    started = time.monotonic()
    spent = run(bench.over(hanging=opened, good=good), 50)
    assert spent < 0.25  # no record waited for it
    assert 0.3 <= time.monotonic() - started < 3
    never.set()
    assert good.steps == list(range(50))
    assert good.end is not None
    (line,) = bench.said
    assert "metrics sink hanging is switched off: it did not close within" in line


def test_a_hang_is_noticed_while_the_run_goes_on(tmp_path: Path) -> None:
    never = threading.Event()
    bench = Bench(tmp_path, timeout_s=0.2)
    hanging = Memory({2: never.wait})
    metrics = bench.over(hanging=hanging)
    with metrics:
        for step in range(3):
            metrics.write(step, {})
        until(lambda: hanging.steps == [0, 1])
        time.sleep(0.3)
        metrics.write(3, {})
        assert bench.said == [
            "warning: metrics sink hanging is switched off: it has not answered for 0.2 s "
            "(2 record(s) are in metrics.jsonl alone)"
        ]
        metrics.write(4, {})
        never.set()  # it comes back: what it had in hand is written, and nothing more
        until(lambda: hanging.steps == [0, 1, 2])
    assert read_metrics(bench.path)[-1][DROPPED] == 2
    assert hanging.end is None
    assert len(bench.said) == 1


def test_a_slow_sink_drops_what_does_not_fit_and_says_so_at_the_end(tmp_path: Path) -> None:
    gate = threading.Event()
    bench = Bench(tmp_path, capacity=4)
    slow = Memory({0: gate.wait})
    metrics = bench.over(slow=slow)
    with metrics:
        metrics.write(0, {})
        until(lambda: metrics._sinks[0]._work.qsize() == 0)  # it has step 0 in hand
        for step in range(1, 10):
            metrics.write(step, {})
        gate.set()
        until(lambda: slow.steps == [0, 1, 2, 3, 4])
        metrics.write(10, {})
    assert slow.steps == [0, 1, 2, 3, 4, 10]
    assert read_metrics(bench.path)[-1][DROPPED] == 5
    assert bench.said == [
        "warning: metrics sink slow was too slow for 5 of 11 records; "
        "they are in metrics.jsonl alone"
    ]


def test_a_failed_run_is_closed_as_one(tmp_path: Path) -> None:
    bench, sink = Bench(tmp_path), Memory()
    with pytest.raises(RuntimeError, match="of the run"), bench.over(sink=sink) as metrics:
        metrics.write(0, {"eval/accuracy": 0.25})
        raise RuntimeError("of the run")
    assert sink.end is not None
    assert sink.end[1] is True


def test_a_full_disk_ends_the_run_and_says_what_to_do(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", kib=64) as disk:
        bench, sink, written = Bench(disk, capacity=100_000), Memory(), 0
        metrics = bench.over(sink=sink)
        with (
            pytest.raises(
                RunError, match=r"metrics.jsonl cannot be written: No space left.*resume="
            ),
            metrics,
        ):
            for written in range(100_000):
                metrics.write(written, {"reward/mean": 0.5, "grad_norm": 1.0})
        assert sink.steps == list(range(written))  # not the one that is in no record
        assert [record["step"] for record in read_metrics(bench.path)] == sink.steps
        remount(disk, "size=4096k")
        again = Metrics(bench.path, [], last_step=5)
        with again:
            again.write(6, {})
        assert [record["step"] for record in read_metrics(bench.path)] == list(range(7))


def test_the_summary_is_what_runs_are_compared_by() -> None:
    records = [
        {"step": 0, "eval/accuracy": 0.25},
        {"step": 1, "reward/mean": 0.5, "tokens/generated": 100, "time/step": 2.0},
        {"step": 2, "reward/mean": None, "tokens/generated": 50, "time/step": 3.0},
        {"step": 2, "eval/accuracy": 0.75},
        {"step": 3, "reward/mean": 0.75, "eval/accuracy": 0.5},
    ]
    assert summarize(records) == {
        "summary/steps": 3,
        "summary/accuracy_before": 0.25,
        "summary/accuracy": 0.5,
        "summary/accuracy_best": 0.75,
        "summary/reward": 0.75,
        "summary/tokens_generated": 150,
        "summary/seconds": 5.0,
    }
    assert summarize([])["summary/seconds"] == 0


def test_configurations_become_flat_keys() -> None:
    nested = {"a": {"b": {"c": 1}, "d": None}, "e": {}, "f": [{"name": "x"}], "g": "text"}
    flat = flatten(nested)
    assert flat == {"a.b.c": 1, "a.d": None, "e": "{}", "f": '[{"name": "x"}]', "g": "text"}
    assert json.loads(str(flat["f"])) == nested["f"]


def test_a_metric_that_nobody_knows_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with Metrics(path, [], known={"reward/mean"}) as metrics:
        metrics.write(1, {"reward/mean": 0.5})
        with pytest.raises(ValueError, match="metrics reward/men, time/x are not in"):
            metrics.write(2, {"reward/mean": 0.5, "time/x": 1.0, "reward/men": 0.5})
    assert [record["step"] for record in read_metrics(path)] == [1]
