"""The process of one episode: it plays one environment, and answers its host.

It is forked from the worker (`actors.environments.child`), with the environment's module already
imported. Whatever the environment raises becomes an answer with `failure`: the last line of the
traceback, and where it was raised. What it prints goes nowhere.
"""

from __future__ import annotations

import contextlib
import os
import random
import socket
import sys
import traceback
from collections.abc import Mapping
from typing import Any

from actors.environments.base import Environment, Reply, ToolCall
from actors.environments.resolve import Factory
from actors.environments.tools import ToolEnvironment, settled
from actors.environments.wire import (
    checked_reward,
    checked_step,
    checked_text,
    frame,
    read_message,
)
from actors.sandbox.programs import Programs

_TRACEBACK_CHARACTERS = 4000
_REASON_CHARACTERS = 500


def play(
    channel: socket.socket, factory: Factory, limit: int, runner: socket.socket | None = None
) -> None:
    """Serve until the host closes its end, or asks to close.

    Args:
        factory: makes the environment when the first message has come.
        limit: characters of an observation.
        runner: where a runner of programs listens, if the environment has any.
    """
    player, me = _Player(factory, limit, runner), os.getpid()
    while (asked := read_message(channel)) is not None:
        answer = player.answer(asked)
        if os.getpid() != me:
            os._exit(0)  # it forked and let the copy return: only one of us may answer
        channel.sendall(frame({**answer, "number": asked["number"]}))
        if asked["verb"] == "close":
            return


class _Player:
    def __init__(self, factory: Factory, limit: int, runner: socket.socket | None) -> None:
        self._factory, self._limit, self._runner = factory, limit, runner
        self._made: Environment | None = None

    def answer(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to one message; nothing that the environment raises gets out."""
        verbs = {
            "describe": self._describe,
            "reset": self._reset,
            "step": self._step,
            "reward": self._reward,
            "close": self._close,
        }
        try:
            return verbs[asked["verb"]](asked)
        except BaseException as error:  # SystemExit too: it may not end the process unheard
            return {"failure": described(error), "traceback": _traceback(error)}

    def _environment(self) -> Environment:
        if self._made is None:
            self._made = self._factory.make()
            if self._runner is not None:
                self._made.runner = Programs(self._factory.programs, self._runner)
        return self._made

    def _describe(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        return {"tools": list(settled(self._environment().tools()))}

    def _reset(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        seed = asked["seed"]
        random.seed(seed)  # forked from one process, all episodes would draw the same
        if "numpy" in sys.modules:
            sys.modules["numpy"].random.seed(seed % 2**32)
        environment = self._environment()
        if isinstance(environment, ToolEnvironment):
            environment.schemas = {tool["function"]["name"]: tool for tool in asked["tools"]}
        first = settled(environment.reset(asked["task"], seed))
        text = "" if first is None else first
        return {"observation": checked_text(text, "the first observation", self._limit)}

    def _step(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        reply = Reply(asked["text"], [ToolCall(*call) for call in asked["calls"]])
        return checked_step(settled(self._environment().step(reply)), self._limit)

    def _reward(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        reward = settled(self._environment().reward(asked["text"]))
        return {"reward": checked_reward(reward, "the reward")}

    def _close(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        if self._made is not None:
            settled(self._made.close())
        return {}


def described(error: BaseException) -> str:
    """The last line of a traceback, and the place in somebody's own code where it began.

    Of a group, which task groups raise, it is the first that is none.
    """
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    last = "".join(traceback.format_exception_only(error)).strip().splitlines()
    frames = traceback.extract_tb(error.__traceback__)
    own = [each for each in frames if each.filename != __file__]
    place = f" ({os.path.basename(own[-1].filename)}:{own[-1].lineno})" if own else ""
    return f"{last[-1] if last else type(error).__name__}"[:_REASON_CHARACTERS] + place


def _traceback(error: BaseException) -> str:
    with contextlib.suppress(Exception):  # an exception whose own text raises
        return "".join(traceback.format_exception(error))[-_TRACEBACK_CHARACTERS:]
    return ""
