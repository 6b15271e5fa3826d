"""Where a run's numbers go.

    metrics.jsonl    the contract: written first; a run ends when it cannot be written
    other sinks      conveniences: each behind an `IsolatedSink`, and no run fails because of one

`Metrics` fans a record out. Sinks that belong to other packages are in `deploy.run.metric_sinks`.
"""

from __future__ import annotations

import json
import math
import os
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Protocol, Self, TextIO

from common.errors import RunError, UserError, first_line
from common.record.metric_names import in_table

Scalar = str | int | float | bool | None
DROPPED = "sinks/dropped"
"""Records that did not reach a sink, all sinks together, when a step was recorded."""
_CAPACITY = 256


class MetricSink(Protocol):
    """Takes one record a learner step, and the run's summary at its end."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def close(self, summary: Mapping[str, float], *, failed: bool) -> None: ...


class NullSink:
    """Takes everything and keeps nothing: a sink that is not open yet, or no more."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def close(self, summary: Mapping[str, float], *, failed: bool) -> None: ...


class JsonlSink:
    """One JSON object a line, flushed a step; NaN and infinities become null.

    On resume, lines of steps after `last_step` (trained, but not in the checkpoint) are removed,
    so that every step stands in the file once. Raises `RunError` when the disk does not take it.
    """

    def __init__(self, path: Path, last_step: int | None = None) -> None:
        self._path = path
        with self._explained():
            if last_step is not None and path.exists():
                kept = [
                    line
                    for number, line in enumerate(_lines(path), 1)
                    if _record(path, number, line)["step"] <= last_step
                ]
                partial = path.with_suffix(".partial")
                partial.write_text("".join(f"{line}\n" for line in kept))
                os.replace(partial, path)
            self._file: TextIO = path.open("a", encoding="utf-8")

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        record = {"step": step} | {
            key: value if math.isfinite(value) else None for key, value in sorted(metrics.items())
        }
        with self._explained():
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()

    def close(self) -> None:
        with self._explained():
            self._file.close()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RunError(
                f"{self._path} cannot be written: {error.strerror or error}. Make room or mend "
                "the disk, then go on with resume="
            ) from error


@dataclass(frozen=True)
class _End:
    summary: Mapping[str, float]
    failed: bool


class IsolatedSink:
    """A sink that the run does not depend on, in a thread of its own behind a bounded queue.

    A sink that raises, or takes longer than `timeout_s` over one record or over what is left at
    the end, is switched off; `warn` is told once, with its name and the cause. While it is slow
    and the queue is full, records are dropped and counted.

    Args:
        open_sink: makes the sink; called in the thread, where it may fail or hang as any record.
    """

    def __init__(
        self,
        name: str,
        open_sink: Callable[[], MetricSink],
        timeout_s: float,
        warn: Callable[[str], None],
        capacity: int = _CAPACITY,
    ) -> None:
        self._name = name
        self._open = open_sink
        self._timeout_s = timeout_s
        self._warn = warn
        self._capacity = capacity
        self._work: SimpleQueue[tuple[int, dict[str, float]] | _End] = SimpleQueue()
        self._switch = threading.Lock()
        self._off = False
        self._given = self._taken = self._refused = 0
        self._busy_since: float | None = time.monotonic()
        self._thread = threading.Thread(target=self._serve, name=f"sink-{name}", daemon=True)
        self._thread.start()

    @property
    def dropped(self) -> int:
        """Records that did not reach the sink and will not."""
        return self._given - self._taken if self._off else self._refused

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Returns at once and raises nothing."""
        self._given += 1
        busy_since = self._busy_since
        if busy_since is not None and time.monotonic() - busy_since > self._timeout_s:
            self._switch_off(f"it has not answered for {self._timeout_s:g} s")
        elif self._work.qsize() >= self._capacity:
            self._refused += 1
        elif not self._off:
            self._work.put((step, dict(metrics)))

    def end(self, summary: Mapping[str, float], *, failed: bool) -> None:
        """Ask it to take what is left and close; `join` waits for that."""
        self._work.put(_End(dict(summary), failed))

    def join(self, deadline: float) -> None:
        """Until it has closed, or until `deadline` on the monotonic clock."""
        if not self._off:
            self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            self._switch_off(f"it did not close within {self._timeout_s:g} s")
        elif self._refused and not self._off:
            self._warn(
                f"warning: metrics sink {self._name} was too slow for {self._refused} of "
                f"{self._given} records; they are in metrics.jsonl alone"
            )

    def _serve(self) -> None:
        sink: MetricSink = NullSink()
        try:
            sink = self._open()
            while not self._off:
                self._busy_since = None
                work = self._work.get()
                self._busy_since = time.monotonic()
                if isinstance(work, _End):
                    sink.close(work.summary, failed=work.failed)
                    return
                sink.write(*work)
                self._taken += 1
        # Another's code may raise anything, and exit. It ends here, the user is warned once, and no
        # run ends of it.
        except (Exception, SystemExit) as error:
            self._switch_off(f"{type(error).__name__}: {first_line(error)}")

    def _switch_off(self, cause: str) -> None:
        with self._switch:
            if self._off:
                return
            self._off = True
        self._warn(
            f"warning: metrics sink {self._name} is switched off: {cause} "
            f"({self.dropped} record(s) are in metrics.jsonl alone)"
        )


class Metrics:
    """Fans a step's record out; a context that closes the sinks with the run's summary.

    Args:
        known: the names that a record may hold, those of data sets with a star; None takes any.
    """

    def __init__(
        self,
        path: Path,
        sinks: Sequence[IsolatedSink],
        last_step: int | None = None,
        timeout_s: float = 30.0,
        known: Collection[str] | None = None,
    ) -> None:
        self._path = path
        self._known = known
        self._record = JsonlSink(path, last_step)
        self._sinks = sinks
        self._timeout_s = timeout_s

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Hand the record of `step` to all sinks.

        Raises:
            RunError: metrics.jsonl cannot be written.
            ValueError: a name is not known. That is a mistake in the code, not in a run.
        """
        if self._known is not None and (
            unknown := sorted(name for name in metrics if in_table(name) not in self._known)
        ):
            raise ValueError(
                f"metrics {', '.join(unknown)} are not in common/record/metric_names.py: add them"
            )
        values = {**metrics, DROPPED: float(sum(sink.dropped for sink in self._sinks))}
        self._record.write(step, values)
        for sink in self._sinks:
            sink.write(step, values)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        """All sinks close at the same time."""
        try:
            self._record.close()
        finally:
            summary = summarize(read_metrics(self._path))
            for sink in self._sinks:
                sink.end(summary, failed=kind is not None)
            deadline = time.monotonic() + self._timeout_s
            for sink in self._sinks:
                sink.join(deadline)


def summarize(records: Sequence[Mapping[str, float | None]]) -> dict[str, float]:
    """What a run is compared by: accuracies as shares, rewards, tokens, seconds; finite ones."""

    def column(key: str) -> list[float]:
        found = [record.get(key) for record in records]
        return [value for value in found if value is not None]

    accuracy, reward = column("eval/accuracy"), column("reward/mean")
    facts = {
        "summary/steps": column("step")[-1:],
        "summary/accuracy_before": accuracy[:1],
        "summary/accuracy": accuracy[-1:],
        "summary/accuracy_best": [max(accuracy)] if accuracy else [],
        "summary/reward": reward[-1:],
        "summary/tokens_generated": [sum(column("tokens/generated"))],
        "summary/seconds": [sum(column("time/step"))],
    }
    return {key: float(value[0]) for key, value in facts.items() if value}


def flatten(values: Mapping[str, object], prefix: str = "") -> dict[str, Scalar]:
    """Nested mappings as dotted keys; lists and empty mappings as JSON."""
    flat: dict[str, Scalar] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{name}.")
        elif isinstance(value, str | int | float | bool | None):
            flat[name] = value
        else:
            flat[name] = json.dumps(value)
    return flat


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The records of a `metrics.jsonl`; a torn last line is left out.

    Raises: `UserError` where a whole line is no record.
    """
    return [_record(path, number, line) for number, line in enumerate(_lines(path), 1)]


def _record(path: Path, number: int, line: str) -> dict[str, float]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict) or not isinstance(record.get("step"), int):
        raise UserError(
            f"{path} is damaged: line {number} is no record of a step. Put a copy back, or take "
            "the line out"
        )
    return record


def _lines(path: Path) -> list[str]:
    text = path.read_text(encoding="utf-8", errors="replace")
    whole, _, _torn = text.rpartition("\n")
    return whole.splitlines()
