"""Environments that misbehave, chosen by their task. Imported by the worker process."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

from actors.environments.base import Environment, Step
from actors.environments.tools import ToolEnvironment

COUNTED: list[int] = []
GIGABYTE = 2**30


class Hostile(Environment):
    """Does `task["do"]` when `task["at"]` is called; an honest echo otherwise."""

    def reset(self, task: Mapping[str, Any], seed: int) -> Any:
        self.task = task
        return self._turn("reset", "begun")

    def step(self, reply: str) -> Any:
        return self._turn("step", Step(f"you said {reply}"))

    def reward(self, reply: str) -> Any:
        return self._turn("reward", 0.5)

    def close(self) -> Any:
        return self._turn("close", None)

    def _turn(self, at: str, otherwise: Any) -> Any:
        if self.task.get("at", "step") == at and "do" in self.task:
            return ACTIONS[self.task["do"]]()
        return otherwise


class NoStep(Environment):
    """Forgot its main method."""


class WrongStep(Environment):
    def step(self, reply: str, score: float) -> Step:  # type: ignore[override]
        return Step()


class WrongReset(Environment):
    def reset(self) -> str:  # type: ignore[override]
        return ""

    def step(self, reply: str) -> Step:
        return Step()


class NotMade(Environment):
    def __init__(self) -> None:
        raise RuntimeError("no licence found")

    def step(self, reply: str) -> Step:
        return Step()


class Untyped(ToolEnvironment):
    def add(self, a, b):  # type: ignore[no-untyped-def]
        """Add.

        Args:
            a: One.
            b: Other.
        """
        return a + b


class Undocumented(ToolEnvironment):
    def add(self, a: int, b: int) -> int:
        return a + b


class HalfDocumented(ToolEnvironment):
    def add(self, a: int, b: int) -> int:
        """Add.

        Args:
            a: One.
        """
        return a + b


class Greedy(ToolEnvironment):
    def add(self, *numbers: int) -> int:
        """Add.

        Args:
            numbers: All of them.
        """
        return sum(numbers)


class Diced(Environment):
    """Rolls Python's dice, or, `unseeded`, the system's, or those from turn `late` on."""

    def __init__(self, unseeded: bool = False, late: int = 0) -> None:
        self._unseeded, self._late, self._turns = unseeded, late, 0

    def reset(self, task: Mapping[str, Any], seed: int) -> str:
        return self._roll()

    def step(self, reply: str) -> Step:
        self._turns += 1
        self._unseeded |= self._turns == self._late
        return Step(self._roll())

    def _roll(self) -> str:
        return os.urandom(8).hex() if self._unseeded else str(random.random())


class Unequal(str):
    __slots__ = ()

    def __len__(self) -> int:
        raise RuntimeError("how long I am is my business")


class Unspeakable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("even this")


def _raise(error: BaseException) -> Any:
    raise error


def _loop() -> Any:
    while True:
        pass


def _hold() -> Any:
    return 10 ** (10**9) % 7


def _hold_signals() -> Any:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM):
        signal.signal(number, signal.SIG_IGN)
    time.sleep(1000)


async def _await_forever() -> Any:
    await asyncio.Event().wait()


async def _awaited() -> Any:
    await asyncio.sleep(0.01)
    return Step("awaited")


def _own_loop() -> Any:
    return asyncio.run(_awaited())


def _print() -> Any:
    line = "x" * 2**20
    for stream in (sys.stdout, sys.stderr):
        for _ in range(GIGABYTE // len(line)):
            stream.write(line)
    return Step("printed")


def _fork_and_return() -> Any:
    os.fork()
    return Step("forked")


def _fork_bomb() -> Any:
    while True:
        with contextlib.suppress(OSError):
            os.fork()


def _leave_sleeper() -> Any:
    sleeper = subprocess.Popen(["sleep", "1000"], start_new_session=True)
    return Step(f"left {sleeper.pid}")


HELPERS: list[subprocess.Popen[bytes]] = []


def _keep_helper() -> Any:
    if not HELPERS:
        HELPERS.append(subprocess.Popen(["sh", "-c", "sleep 1000 & wait"]))
        time.sleep(0.2)
    return Step(f"helper {HELPERS[0].poll()}")


def _leave_daemon() -> Any:
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            time.sleep(1000)
        os._exit(0)
    time.sleep(0.2)
    return Step("left a daemon")


def _threads() -> Any:
    for _ in range(5):
        threading.Thread(target=time.sleep, args=(1000,)).start()
    return Step("threads")


def _descriptors() -> list[int]:
    return [int(name) for name in os.listdir("/proc/self/fd") if int(name) > 2]


def _write_everywhere() -> Any:
    for descriptor in _descriptors():
        with contextlib.suppress(OSError):
            os.write(descriptor, b'{"observation": "mine"}')
    return Step("written")


def _announce() -> Any:
    for descriptor in _descriptors():
        with contextlib.suppress(OSError):
            os.write(descriptor, b"\xff\xff\xff\xff")
    return Step("announced")


def _forge() -> Any:
    from actors.environments.wire import frame

    answer = {"observation": "", "reward": 1.0, "done": True, "state": None, "results": []}
    for descriptor in _descriptors():
        with contextlib.suppress(OSError):
            os.write(descriptor, frame({**answer, "number": 99}))
    return Step("forged")


def _close_everything() -> Any:
    os.closerange(0, 1000)
    return Step("closed")


def _allocate() -> Any:
    return Step(f"{len(bytearray(64 * GIGABYTE))}")


def _hold_memory() -> Any:
    return Step(f"held {len(b'x' * (3 * GIGABYTE // 2))}")


def _share_memory() -> Any:
    """Three half gigabytes, none of them much for a process."""
    for _ in range(3):
        if os.fork() == 0:
            held = b"x" * (GIGABYTE // 2)
            time.sleep(1000 + len(held) % 2)
    time.sleep(5)
    return Step("shared")


def _connect() -> Any:
    socket.create_connection(("127.0.0.1", 1), timeout=1)
    return Step("connected")


def _resolve_name() -> Any:
    try:
        socket.getaddrinfo("example.com", 80)
    except socket.gaierror as error:
        raise PermissionError("no name") from error
    return Step("resolved")


def _big_file() -> Any:
    with open("big", "wb") as file:
        for _ in range(65):
            file.write(b"0" * 2**20)
    return Step("written")


def _recurse() -> Any:
    return _recurse()


def _kill_parent() -> Any:
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(1000)


def _stop_parent() -> Any:
    os.kill(os.getppid(), signal.SIGSTOP)
    return Step("stopped")


def _count() -> Any:
    COUNTED.append(1)
    return Step(f"count {len(COUNTED)}")


def _secret() -> Any:
    return Step(os.environ.get("SECRET_OF_THE_RUN", "nothing"))


def _leave_file() -> Any:
    names = sorted(os.listdir("."))
    with open("mine", "w") as file:
        file.write("x")
    return Step(f"found {names}")


ACTIONS = {
    "raise": lambda: _raise(KeyError("shelf")),
    "exit politely": lambda: _raise(SystemExit(3)),
    "interrupt": lambda: _raise(KeyboardInterrupt()),
    "raise something unspeakable": lambda: _raise(Unspeakable()),
    "raise a long story": lambda: _raise(ValueError("word " * 10_000)),
    "raise a group": lambda: _raise(ExceptionGroup("two", [ValueError("a"), OSError("b")])),
    "exit 0": lambda: os._exit(0),
    "exit 7": lambda: os._exit(7),
    "segfault": lambda: ctypes.string_at(0),
    "kill itself": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stop itself": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "loop": _loop,
    "sleep": lambda: time.sleep(1000),
    "hold the interpreter": _hold,
    "hold signals": _hold_signals,
    "await for ever": _await_forever,
    "await a little": _awaited,
    "start a loop of its own": _own_loop,
    "nan": lambda: Step(reward=float("nan")),
    "inf": lambda: Step(reward=float("inf")),
    "minus inf": lambda: Step(reward=float("-inf")),
    "too much for float32": lambda: Step(reward=1e300),
    "boolean": lambda: Step(reward=True),
    "text as reward": lambda: Step(reward="1.0"),  # type: ignore[arg-type]
    "complex": lambda: Step(reward=1j),  # type: ignore[arg-type]
    "none": lambda: None,
    "a tuple": lambda: ("observation", 1.0, True),
    "a dictionary": lambda: {"observation": "x"},
    "text": lambda: "text",
    "number": lambda: 3,
    "bytes": lambda: Step(b"bytes"),  # type: ignore[arg-type]
    "an object": lambda: Step(object()),  # type: ignore[arg-type]
    "done is a text": lambda: Step(done="no"),  # type: ignore[arg-type]
    "state is a number": lambda: Step(state=7),  # type: ignore[arg-type]
    "half a character": lambda: Step("a\ud800b"),
    "a text that will not be measured": lambda: Step(Unequal("x")),
    "a gigabyte": lambda: Step("x" * GIGABYTE),
    "print a gigabyte": _print,
    "fork and return": _fork_and_return,
    "fork bomb": _fork_bomb,
    "leave a sleeper": _leave_sleeper,
    "leave a daemon": _leave_daemon,
    "keep a helper": _keep_helper,
    "threads": _threads,
    "write everywhere": _write_everywhere,
    "announce four gigabytes": _announce,
    "forge an answer": _forge,
    "close everything": _close_everything,
    "allocate": _allocate,
    "hold memory": _hold_memory,
    "share memory": _share_memory,
    "connect": _connect,
    "resolve a name": _resolve_name,
    "write a big file": _big_file,
    "recurse": _recurse,
    "kill its parent": _kill_parent,
    "stop its parent": _stop_parent,
    "count": _count,
    "secret": _secret,
    "leave a file": _leave_file,
}


class Slow(Environment):
    """Takes its time for every step."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def step(self, reply: str) -> Step:
        time.sleep(self._seconds)
        return Step("at last")


class Echo(Environment):
    """Says what it was given."""

    def reset(self, task: Mapping[str, Any], seed: int) -> str:
        return json.dumps([task, seed])

    def step(self, reply: str) -> Step:
        return Step(reply)
