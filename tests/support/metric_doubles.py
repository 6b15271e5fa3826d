"""Doubles of metric sinks."""

from __future__ import annotations

from collections.abc import Callable, Mapping


class Memory:
    """A sink that keeps what it is given, and does at a step what it is told."""

    def __init__(self, at: Mapping[int, Callable[[], object]] | None = None) -> None:
        self.records: list[tuple[int, dict[str, float]]] = []
        self.end: tuple[dict[str, float], bool] | None = None
        self._at = at or {}

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        if step in self._at:
            self._at[step]()
        self.records.append((step, dict(metrics)))

    def close(self, summary: Mapping[str, float], *, failed: bool) -> None:
        if -1 in self._at:
            self._at[-1]()
        self.end = (dict(summary), failed)

    @property
    def steps(self) -> list[int]:
        return [step for step, _ in self.records]


def fail(error: BaseException) -> Callable[[], object]:
    """A function that raises `error`."""

    def raise_it() -> object:
        raise error

    return raise_it
