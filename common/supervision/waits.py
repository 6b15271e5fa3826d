"""Every wait of the coordinator has an owner, a cause and a deadline.

`Waits.on` runs an awaitable under a deadline and keeps one line about it meanwhile. The display
shows these lines ("who waits for whom"), and a stall report prints them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from common.errors import StallError

T = TypeVar("T")


@dataclass(frozen=True)
class Wait:
    """A wait under way."""

    owner: str
    """Who waits."""
    cause: str
    """What for."""
    since: float
    """When it began, by time.monotonic(), in seconds."""


class Waits:
    """The waits under way in this process."""

    def __init__(self) -> None:
        self._waits: dict[int, Wait] = {}
        self._next = 0
        self.seconds: dict[str, float] = {}
        """Total time waited, by owner."""

    async def on(self, awaitable: Awaitable[T], *, owner: str, cause: str, deadline_s: float) -> T:
        """Await under a deadline.

        Args:
            owner: who waits, for the report.
            cause: what for.

        Raises:
            StallError: `deadline_s` seconds have passed; with all waits in its message.
            Exception: the awaitable's own, with a note of who waited for what.
        """
        key, started = self._next, time.monotonic()
        self._next += 1
        self._waits[key] = Wait(owner, cause, started)
        try:
            # Not `wait_for`: it may swallow a cancellation, and a time-out of the awaitable's own
            # must not pass for this deadline.
            async with asyncio.timeout(None) as deadline:
                with _expires(deadline, deadline_s):
                    return await awaitable
        except Exception as error:
            if isinstance(error, TimeoutError) and deadline.expired():
                raise StallError(
                    f"{owner} waited {deadline_s:.0f} s for {cause}, its deadline.\n{self.report()}"
                ) from error
            error.add_note(f"{owner} waited for {cause}")
            raise
        finally:
            del self._waits[key]
            self.seconds[owner] = self.seconds.get(owner, 0.0) + time.monotonic() - started

    def under_way(self) -> list[Wait]:
        """All waits of this moment, longest first."""
        return sorted(self._waits.values(), key=lambda wait: wait.since)

    def report(self) -> str:
        """All waits of this moment, a line each."""
        now = time.monotonic()
        lines = [
            f"  {w.owner} waits for {w.cause}, {now - w.since:.1f} s" for w in self.under_way()
        ]
        return "Who waits for whom:\n" + "\n".join(lines)


@contextmanager
def _expires(deadline: asyncio.Timeout, after_s: float) -> Iterator[None]:
    """Expire `deadline` after `after_s` seconds, later if this process stood still at the end.

    After Ctrl-Z and `fg` the answers may be there and merely unread.
    """
    loop, after_s = asyncio.get_running_loop(), max(0.0, after_s)
    due = loop.time() + after_s
    timer = loop.call_later(after_s, lambda: expire(due))

    def expire(when: float) -> None:
        nonlocal timer
        late = loop.time() - when
        if late > _STOOD_STILL_S:
            later = loop.time() + late
            timer = loop.call_at(later, lambda: expire(later))
        else:
            deadline.reschedule(loop.time())

    try:
        yield
    finally:
        timer.cancel()


_STOOD_STILL_S = 2.0
"""A timer as late as this says that the process was stopped, or did something else for so long."""


async def until(condition: asyncio.Condition, predicate: Callable[[], Any]) -> Any:
    """Wait on `condition` until `predicate()` is neither None nor False; return its value."""
    async with condition:
        while True:
            value = predicate()
            if value is not None and value is not False:
                return value
            await condition.wait()
