"""How long each part of a run's start took: the metrics `time/start/*` of its first record."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

from common.supervision.processes import stat_of

_STARTED = 19
"""Number of the field of /proc/PID/stat behind the process's name that says when it started."""


class StartTimes:
    """Seconds by part. Generators, learner and verifiers start side by side."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}

    def process(self) -> None:
        """Now the process has what it needs, and has read its configuration."""
        self._seconds["time/start/process"] = process_age()

    @contextmanager
    def part(self, metric: str) -> Iterator[None]:
        """What is done meanwhile is the part of that name; not on record when it fails."""
        began = time.monotonic()
        yield
        self._seconds[metric] = time.monotonic() - began

    def once(self) -> dict[str, float]:
        """The seconds of all parts; nothing when asked again."""
        seconds, self._seconds = self._seconds, {}
        return seconds


def process_age() -> float:
    """Seconds since this process was started, its interpreter and imports included."""
    started = int(stat_of("self")[_STARTED]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started
