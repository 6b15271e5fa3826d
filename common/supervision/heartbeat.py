"""Signs of life: every actor is asked, every few seconds, whether it is there.

A process that hangs is found once it has been silent for `restart.silence_s`. The deadline of its
work may be much later. Ray itself watches nodes, not actors.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

HEALTH = "health"
"""The concurrency group that answers in actors whose other calls take long."""


async def beat(every_s: float, asks: Sequence[Callable[[], Awaitable[Any]]]) -> None:
    """Ask each for ever, `every_s` seconds after its last answer; with 0 never.

    Raises:
        ExceptionGroup: the error of one, such as `StallError` at a deadline. It ends all.
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
