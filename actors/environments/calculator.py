"""An environment for small models: questions that want a calculator, and a calculator.

The policy writes `[calc: 34 * 56]` and is told `result: 1904`. A reply without a call ends the
episode. It is right when the last number in it is the answer. No template with tools is needed.

`python -m actors.environments.calculator ROWS` prints as many tasks, a line of JSON each.
"""

from __future__ import annotations

import itertools
import json
import random
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from actors.environments.base import Environment, Step, ToolResult

SYSTEM = (
    "You may use a calculator: write [calc: 3*4] and you are told the result. "
    "Then answer with the number only."
)
_CALL = re.compile(r"\[calc:\s*([^\[\]]{1,80})\]")
_PRODUCT = re.compile(r"\s*(-?\d{1,18})\s*([*+-])\s*(-?\d{1,18})\s*")
_NUMBER = re.compile(r"-?\d+")
_WRONG = "error:"


class Calculator(Environment):
    """Rewards 1 for the right number, 0 for any other."""

    def reset(self, task: Mapping[str, Any], seed: int) -> str:
        self._answer = int(str(task["answer"]))
        return ""

    def step(self, reply: str) -> Step:
        call = _CALL.search(reply)
        if call is None:
            return Step(reward=self._worth(reply), done=True)
        said = _computed(call[1])
        return Step(said, results=(ToolResult("calc", said, said.startswith(_WRONG)),))

    def reward(self, reply: str) -> float:
        return 0.0  # it was still calculating

    def _worth(self, reply: str) -> float:
        numbers = _NUMBER.findall(reply)
        return float(bool(numbers) and int(numbers[-1][-100:]) == self._answer)


def _computed(expression: str) -> str:
    parts = _PRODUCT.fullmatch(expression)
    if parts is None:
        return f"{_WRONG} write two whole numbers with *, + or - between them"
    left, right = int(parts[1]), int(parts[3])
    value = {"*": left * right, "+": left + right, "-": left - right}[parts[2]]
    return f"result: {value}"


def tasks(low: int = 12, high: int = 99, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Endless products of two numbers between `low` and `high`: `question` and `answer`, behind a
    system message and one example of a call, as messages."""
    draw = random.Random(seed)
    while True:
        left, right = draw.randint(low, high), draw.randint(low, high)
        yield {"prompt": example(f"What is {left} * {right}?"), "answer": str(left * right)}


def example(question: str) -> list[dict[str, str]]:
    """A conversation that shows one call, and ends with the question."""
    said = [
        ("system", SYSTEM),
        ("user", "What is 23 * 47?"),
        ("assistant", "[calc: 23*47]"),
        ("user", "result: 1081"),
        ("assistant", "1081"),
        ("user", question),
    ]
    return [{"role": role, "content": content} for role, content in said]


if __name__ == "__main__":
    for task in itertools.islice(tasks(), int(sys.argv[1])):
        print(json.dumps(task))
