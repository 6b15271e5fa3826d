"""Loops side by side: one of them ends, the others never do."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from common.errors import RunError

T = TypeVar("T")

_YOUNG = 20_000
"""Objects made since the last collection that begin another; Python's own is 700. A coordinator's
are freed by their counts, all but a few."""


@contextmanager
def old_objects_settled() -> Iterator[None]:
    """What is in memory now is looked at by no garbage collection inside.

    Modules and what a start has made are nearly all objects of this process, and live as long.
    """
    threshold = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.set_threshold(_YOUNG, *threshold[1:])
    try:
        yield
    finally:
        gc.set_threshold(*threshold)
        gc.unfreeze()


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
