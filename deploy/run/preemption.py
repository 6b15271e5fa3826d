"""SIGTERM, and SIGHUP of a closed terminal: finish the step, save, end with status 0.

A second one ends at once.
"""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Preemption:
    """Answers SIGTERM for `task`, the whole of the program, as soon as it is made."""

    def __init__(self, task: asyncio.Task[Any], grace_s: float) -> None:
        self.requested = asyncio.Event()
        """The learner looks at it between its steps."""
        self._task = task
        self._grace_s = grace_s
        self._steps = False
        self._loop = asyncio.get_running_loop()
        self.listen()

    def listen(self) -> None:
        """Take the signal. `ray.init` replaces the handler by one that aborts: call this after.

        Only a main thread may. Elsewhere, as in a notebook, SIGTERM stays with the program that
        the run is part of, and ends both.
        """
        if threading.current_thread() is not threading.main_thread():
            return
        self._loop.add_signal_handler(signal.SIGTERM, self._on_signal)
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup ignores it
            self._loop.add_signal_handler(signal.SIGHUP, self._on_signal)

    @contextmanager
    def between_steps(self) -> Iterator[None]:
        """Inside, a request is seen between two steps; outside there is nothing to save."""
        self._steps = True
        try:
            yield
        finally:
            self._steps = False

    def _on_signal(self) -> None:
        if self.requested.is_set() or not self._steps:
            self._task.cancel("SIGTERM")
            return
        self.requested.set()
        self._loop.call_later(self._grace_s, self._task.cancel, "SIGTERM")
