"""Signs of life: every process is asked in its own time, and silence is an error."""

from __future__ import annotations

import asyncio

import pytest

from common.errors import StallError
from common.supervision.heartbeat import beat
from common.supervision.loops import first_cause
from common.supervision.waits import Waits


def test_all_are_asked_again_and_a_slow_one_holds_up_no_other() -> None:
    asked = {"quick": 0, "slow": 0}

    async def quick() -> None:
        asked["quick"] += 1

    async def slow() -> None:
        asked["slow"] += 1
        await asyncio.sleep(60.0)

    async def main() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(beat(0.01, [quick, slow]), 0.5)

    asyncio.run(main())
    assert asked["quick"] > 5
    assert asked["slow"] == 1


def test_silence_is_an_error_that_names_the_silent() -> None:
    async def main() -> None:
        silent = asyncio.Event()
        waits = Waits()
        await beat(
            0.01,
            [lambda: waits.on(silent.wait(), owner="heartbeat", cause="rank 3", deadline_s=0.1)],
        )

    with pytest.raises(ExceptionGroup) as caught:
        asyncio.run(main())
    cause = first_cause(caught.value)
    assert isinstance(cause, StallError)
    assert "heartbeat waited 0 s for rank 3" in str(cause)


def test_none_are_asked_with_an_interval_of_zero() -> None:
    async def ask() -> None:
        raise AssertionError("asked")

    async def main() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(beat(0.0, [ask]), 0.1)

    asyncio.run(main())
