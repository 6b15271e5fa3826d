"""Signals that ask a run to save and end."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Iterator

import pytest

from deploy.run.preemption import Preemption


@pytest.fixture(params=[signal.SIGTERM, signal.SIGHUP])
def asked(request: pytest.FixtureRequest) -> Iterator[Callable[[], None]]:
    """Sends the signal to this process, which would end of it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # as under no nohup
    yield lambda: os.kill(os.getpid(), request.param)
    signal.signal(signal.SIGHUP, before)


def test_between_two_steps_it_is_a_request_and_a_second_one_ends(
    asked: Callable[[], None],
) -> None:
    async def run() -> None:
        task = asyncio.current_task()
        assert task is not None
        preemption = Preemption(task, 60.0)
        with preemption.between_steps():
            asked()
            await asyncio.wait_for(preemption.requested.wait(), 20)
            asked()
            with pytest.raises(asyncio.CancelledError):
                await asyncio.sleep(20)
            task.uncancel()

    asyncio.run(run())


def test_where_nothing_is_to_be_saved_the_first_one_ends(asked: Callable[[], None]) -> None:
    async def run() -> None:
        task = asyncio.current_task()
        assert task is not None
        preemption = Preemption(task, 60.0)
        asked()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.sleep(20)
        assert not preemption.requested.is_set()
        task.uncancel()

    asyncio.run(run())
