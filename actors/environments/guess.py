"""An environment of several turns for tiny models: guess a number, told whether it is higher.

Without an answer in the task the secret follows from the group's seed; all episodes of a group look
for the same number.

`python -m actors.environments.guess ROWS` prints as many tasks, a line of JSON each.
"""

from __future__ import annotations

import itertools
import json
import random
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from actors.environments.base import Environment, Step

LOW, HIGH = 1, 8
QUESTION = "Guess my secret number from {low} to {high}. Say one number only."
HIGHER, LOWER = "The secret is higher than ", "The secret is lower than "
NEXT = ". Next guess?"
FIRST_GAME = 1000
"""Number of the first game of `tasks`: the number tells questions apart, and nothing else."""

_NUMBER = re.compile(r"\d+")


class Guess(Environment):
    """Rewards 1 for the secret, 0 where it was not found.

    Args:
        waste: what a guess costs, in its turn, that was ruled out before. The last turn gives all
            of it back: the reward of the episode is 1 or 0.
    """

    def __init__(self, low: int = LOW, high: int = HIGH, waste: float = 0.0) -> None:
        self._low, self._high = low, high
        self._waste = waste

    def reset(self, task: Mapping[str, Any], seed: int) -> str:
        secret = task.get("answer")
        drawn = random.Random(seed).randint(self._low, self._high)
        self._secret = drawn if secret in (None, "") else int(str(secret))
        self.possible = (self._low, self._high)
        self._wasted = 0.0
        return ""

    def step(self, reply: str) -> Step:
        low, high = self.possible
        state = f"{low}..{high}"
        found = _NUMBER.search(reply)
        guess = int(found[0][:9]) if found else None
        if guess == self._secret:
            return Step(reward=1.0 + self._wasted, done=True, state=state)
        cost = 0.0 if guess is not None and low <= guess <= high else self._waste
        self._wasted += cost
        return Step(self._told(guess), -cost if cost else None, state=state)

    def _told(self, guess: int | None) -> str:
        if guess is None:
            return f"Say a number from {self._low} to {self._high}."
        low, high = self.possible
        if guess < self._secret:
            self.possible = (max(low, guess + 1), high)
            return f"{HIGHER}{guess}{NEXT}"
        self.possible = (low, min(high, guess - 1))
        return f"{LOWER}{guess}{NEXT}"

    def reward(self, reply: str) -> float:
        return self._wasted


def tasks(low: int = LOW, high: int = HIGH, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Endless games of secrets between `low` and `high`: `prompt` and `answer`."""
    draw = random.Random(seed)
    question = QUESTION.format(low=low, high=high)
    for game in itertools.count(FIRST_GAME):
        yield {"prompt": f"Game {game}. {question}", "answer": str(draw.randint(low, high))}


if __name__ == "__main__":
    for task in itertools.islice(tasks(), int(sys.argv[1])):
        print(json.dumps(task))
