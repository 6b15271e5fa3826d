"""Environments that take their time, for runs of the tiny model. Imported by the worker process."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping
from typing import Any

from actors.environments.base import Environment, Step


class Patient(Environment):
    """Asks for more, `turns` times in all. It is worth the share of digits in the last reply.

    It answers after up to `seconds` seconds, which no seed decides. What it says does not depend on
    them.
    """

    def __init__(self, turns: int = 3, seconds: float = 0.0) -> None:
        self._turns, self._seconds, self._turn = turns, seconds, 0

    def reset(self, task: Mapping[str, Any], seed: int) -> str:
        return ""

    def step(self, reply: str) -> Step:
        time.sleep(random.SystemRandom().uniform(0.0, self._seconds))
        self._turn += 1
        if self._turn == self._turns:
            digits = sum(letter.isdigit() for letter in reply)
            return Step(reward=digits / max(len(reply), 1), done=True)
        return Step(f"{len(reply)} {reply[-4:]}?", state=f"turn {self._turn}")

    def reward(self, reply: str) -> float:
        return 0.0


class Sleeper(Environment):
    """Sleeps as many seconds as it is told, and is done."""

    def step(self, reply: str) -> Step:
        time.sleep(float(reply))
        return Step(reward=1.0, done=True)
