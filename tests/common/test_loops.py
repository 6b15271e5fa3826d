"""Loops side by side: whatever ends first ends all, and its result or error is what comes out."""

from __future__ import annotations

import asyncio

import pytest

from common.errors import RunError
from common.supervision.loops import first_cause, until_it_ends


async def ends() -> None:
    """A loop that should not."""


async def fails() -> None:
    raise ValueError("cause")


def test_the_result_comes_out_and_the_endless_have_ended() -> None:
    ended = []

    async def works() -> int:
        await asyncio.sleep(0.01)
        return 7

    async def endless() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0.01)  # ending takes a while
            ended.append(True)

    assert asyncio.run(until_it_ends(works(), endless(), endless())) == 7
    assert ended == [True, True]


def test_an_endless_loop_that_ends_is_an_error() -> None:
    async def works() -> None:
        await asyncio.sleep(5)

    with pytest.raises(RunError, match="never should"):
        asyncio.run(until_it_ends(works(), ends()))
    with pytest.raises(ValueError, match="cause"):
        asyncio.run(until_it_ends(works(), fails()))
    with pytest.raises(ValueError, match="cause"):
        asyncio.run(until_it_ends(fails(), asyncio.Event().wait()))


def test_the_first_cause_is_no_group() -> None:
    inner = ExceptionGroup("inner", [ValueError("cause"), KeyError("beside")])
    assert str(first_cause(ExceptionGroup("outer", [inner]))) == "cause"
