"""Every wait has an owner, a cause and a deadline."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from common.errors import StallError
from common.supervision.waits import Waits, until


def test_a_passed_deadline_says_who_waited_for_whom() -> None:
    async def run() -> None:
        waits = Waits()
        other = asyncio.create_task(
            waits.on(asyncio.sleep(5), owner="publish", cause="generator-1", deadline_s=9)
        )
        await asyncio.sleep(0)
        with pytest.raises(StallError) as caught:
            await waits.on(
                asyncio.Event().wait(), owner="learner", cause="8 groups", deadline_s=0.05
            )
        assert "learner waited" in str(caught.value)
        assert "publish waits for generator-1" in str(caught.value)
        other.cancel()
        await asyncio.gather(other, return_exceptions=True)
        assert waits.under_way() == []
        assert waits.seconds["learner"] >= 0.05

    asyncio.run(run())


def test_results_and_errors_pass_through() -> None:
    async def fail() -> None:
        raise ValueError("its own error")

    async def run() -> None:
        waits = Waits()
        assert await waits.on(asyncio.sleep(0, 7), owner="a", cause="b", deadline_s=1) == 7
        with pytest.raises(ValueError, match="its own error") as caught:
            await waits.on(fail(), owner="a", cause="b", deadline_s=1)
        assert caught.value.__notes__ == ["a waited for b"]

    asyncio.run(run())


@pytest.mark.parametrize("answered", [True, False])
def test_an_answer_that_came_while_the_process_stood_still_counts(answered: bool) -> None:
    """The deadline passes and the answer comes while nothing runs; what is unread is read first."""

    async def run() -> str:
        loop, answer = asyncio.get_running_loop(), asyncio.Event()
        timer = threading.Timer(0.5, lambda: loop.call_soon_threadsafe(late_answer))

        def late_answer() -> None:  # as Ray's answers: by way of another callback
            loop.call_later(0.2, answer.set)

        waiting = asyncio.create_task(
            Waits().on(answer.wait(), owner="a", cause="b", deadline_s=0.3)
        )
        await asyncio.sleep(0.1)
        if answered:
            timer.start()
        time.sleep(2.6)
        try:
            return "answered" if await waiting else "nothing"
        except StallError:
            return "expired"

    started = time.monotonic()
    assert asyncio.run(run()) == ("answered" if answered else "expired")
    assert time.monotonic() - started < (3.5 if answered else 7.0)


def test_a_deadline_in_the_past_expires_at_once() -> None:
    async def run() -> None:
        with pytest.raises(StallError):
            await Waits().on(asyncio.Event().wait(), owner="a", cause="b", deadline_s=-5.0)

    asyncio.run(asyncio.wait_for(run(), 1.0))


def test_until_misses_no_wake_up() -> None:
    async def run() -> None:
        condition, box = asyncio.Condition(), []

        async def put() -> None:
            for value in range(3):
                await asyncio.sleep(0)
                async with condition:
                    box.append(value)
                    condition.notify_all()

        task = asyncio.create_task(put())
        value = await asyncio.wait_for(until(condition, lambda: box if len(box) == 3 else None), 1)
        assert value == [0, 1, 2]
        await task

    asyncio.run(run())
