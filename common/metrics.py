"""Where a run's numbers go: `metrics.jsonl` (the contract) and TensorBoard event files."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol, TextIO


class MetricSink(Protocol):
    """Takes one record a learner step."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class JsonlSink:
    """One JSON object a line, flushed a step; NaN and infinities become null.

    On resume, lines of steps after `last_step` (trained, but not in the checkpoint) are removed,
    so that every step stands in the file once.
    """

    def __init__(self, path: Path, last_step: int | None = None) -> None:
        if last_step is not None and path.exists():
            kept = [line for line in _lines(path) if json.loads(line)["step"] <= last_step]
            partial = path.with_suffix(".partial")
            partial.write_text("".join(f"{line}\n" for line in kept))
            os.replace(partial, path)
        self._file: TextIO = path.open("a", encoding="utf-8")

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        record = {"step": step} | {
            key: value if math.isfinite(value) else None for key, value in sorted(metrics.items())
        }
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class TensorBoardSink:
    """Scalars under `folder`."""

    def __init__(self, folder: Path, last_step: int | None = None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purge = None if last_step is None else last_step + 1
        self._writer = SummaryWriter(str(folder), purge_step=purge, flush_secs=10)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        for key, value in metrics.items():
            if math.isfinite(value):
                self._writer.add_scalar(key, value, step)

    def close(self) -> None:
        self._writer.close()


class Metrics:
    """Fans a step's record out to its sinks."""

    def __init__(self, sinks: Sequence[MetricSink]) -> None:
        self._sinks = sinks

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        for sink in self._sinks:
            sink.write(step, metrics)

    def close(self) -> None:
        for sink in self._sinks:
            sink.close()


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The records of a `metrics.jsonl`; a torn last line is left out."""
    return [json.loads(line) for line in _lines(path)]


def _lines(path: Path) -> list[str]:
    text = path.read_text(encoding="utf-8")
    whole, _, _torn = text.rpartition("\n")
    return whole.splitlines()
