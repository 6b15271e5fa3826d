"""A second try at the tasks of reasoning-gym: a wrong answer is said to be wrong, once.

    environment.name=deploy.examples.environments.second_try:SecondTry data.source=reasoning_gym

Any task will do (`data.reasoning_gym.task`). A right second answer is worth half.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from actors.environments.base import Environment, Step
from actors.verifiers.reasoning_gym import score


class SecondTry(Environment):
    """Judges replies with the task's own scorer."""

    def __init__(self, tries: int = 2) -> None:
        self._tries = tries

    def reset(self, task: Mapping[str, Any], seed: int) -> str:
        self._task, self._left = dict(task), self._tries
        return ""

    def step(self, reply: str) -> Step:
        self._left -= 1
        verdict = score(reply, self._task)
        if verdict.reward is None:
            raise RuntimeError(verdict.reason)  # the scorer's failure is not a wrong answer
        if verdict.reward > 0:
            made = self._tries - self._left
            return Step(reward=verdict.reward / made, done=True)
        if self._left == 0:
            return Step(reward=0.0, done=True)
        return Step("That is not right. Look at your steps again, and give another answer.")

    def reward(self, reply: str) -> float:
        """Nothing: it was never right."""
        return 0.0
