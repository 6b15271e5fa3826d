"""A coroutine run to its end from anywhere: a script, a cell of a notebook, a thread."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


def run_to_end(main: Coroutine[Any, Any, T]) -> T:
    """The result of `main` in an event loop of its own; in a thread where one runs already.

    Ctrl-C cancels `main` and is raised when that has ended, as by `asyncio.run`.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(main)
    return _in_thread(main)


def _in_thread(main: Coroutine[Any, Any, T]) -> T:
    outcome, errors = list[T](), list[BaseException]()
    tasks: list[asyncio.Task[Any]] = []
    # Not `Thread.join`, which holds a thread for ended when Ctrl-C interrupts it.
    began, ended = threading.Event(), threading.Event()

    async def watched() -> T:
        task = asyncio.current_task()
        assert task is not None
        tasks.append(task)
        began.set()
        return await main

    def run() -> None:
        try:
            outcome.append(asyncio.run(watched()))
        except BaseException as error:  # handed to the caller's thread, which raises it
            errors.append(error)
        finally:
            began.set()
            ended.set()

    threading.Thread(target=run, name="train").start()
    try:
        ended.wait()
    except KeyboardInterrupt:
        began.wait()
        for task in tasks:
            if not ended.is_set():
                task.get_loop().call_soon_threadsafe(task.cancel)
        ended.wait()  # whatever a run waits for at its end has a deadline
        raise
    if errors:
        raise errors[0]
    return outcome[0]
