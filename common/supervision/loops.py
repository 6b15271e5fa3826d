"""Loops side by side: one of them ends, the others never do."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from common.errors import RunError

T = TypeVar("T")


async def until_it_ends(finite: Coroutine[Any, Any, T], *endless: Coroutine[Any, Any, object]) -> T:
    """Run all loops until `finite` ends, and return its result.

    All have ended when this returns or raises.

    Raises:
        Exception: the error of the loop that ended first.
    """
    main = asyncio.ensure_future(finite)
    beside = [asyncio.ensure_future(loop) for loop in endless]
    try:
        await asyncio.wait([main, *beside], return_when=asyncio.FIRST_COMPLETED)
        for task in beside:
            if task.done():
                await task
                raise RunError("a loop returned that never should: please report it")
        return await main
    finally:
        for each in (main, *beside):
            each.cancel()
        await asyncio.gather(main, *beside, return_exceptions=True)


def first_cause(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first error inside nested groups."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
