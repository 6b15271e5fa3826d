"""Signs of life: every actor is asked, every few seconds, whether it is there.

A process that hangs is then found as soon as it is silent for `restart.silence_s`, whatever the
deadline of what it was asked to do. Ray itself watches nodes, not actors.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

HEALTH = "health"
"""The concurrency group that answers in actors whose other calls take long."""


async def beat(every_s: float, asks: Sequence[Callable[[], Awaitable[Any]]]) -> None:
    """Ask each, `every_s` seconds after its last answer, for ever; with 0 never.

    An error of one, as `StallError` from a deadline, ends all.
    """

    async def again_and_again(ask: Callable[[], Awaitable[Any]]) -> None:
        while True:
            await asyncio.sleep(every_s)
            await ask()

    if every_s == 0:
        await asyncio.Event().wait()
    async with asyncio.TaskGroup() as tasks:
        for ask in asks:
            tasks.create_task(again_and_again(ask))
