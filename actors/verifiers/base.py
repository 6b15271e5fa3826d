"""What a verdict is, and how an answer is found in a text.

A verifier is any callable `score(text, reference, **args) -> float | Verdict`: `text` is one
completion, `reference` the dictionary a prompt carries (`prompt`, `answer`, and for
reasoning-gym `task`, `params`, `entry`), `args` what the configuration gives the rule.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal, Protocol, get_args

from common.errors import UserError
from common.record.schema import ERROR, FAIL, PASS, TIMEOUT

Extract = Literal["full", "last_number", "boxed", "answer_tag", "last_line"]

NUMBER = re.compile(r"(?<![\w.])-?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?")
"""A decimal number. A minus behind a digit or letter is a subtraction, not a sign."""
_ANSWER_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL | re.IGNORECASE)
_BOXED = re.compile(r"\\boxed\s*\{")
_LINK = re.compile(r"[\s$]*(?:,|;|and|or|,\s*and|,\s*or)[\s$]*")

_LARGEST = float.fromhex("0x1.fffffep+127")
"""Of float32."""


@dataclass(frozen=True)
class Verdict:
    """One rule's judgement of one completion.

    `pass` is a reward above 0 and `fail` one of 0 or less: a graded rule passes with any credit
    at all, so that "never solved" means exactly "nothing to learn from". `error` and `timeout`
    say that the rule could not judge; they carry no reward, and never 0.
    """

    kind: str
    reward: float | None
    reason: str = ""

    def __post_init__(self) -> None:
        if self.kind not in (PASS, FAIL, ERROR, TIMEOUT):
            raise ValueError(f"verdict {self.kind!r} is none of pass, fail, error, timeout")
        if self.kind in (ERROR, TIMEOUT):
            if self.reward is not None:
                raise ValueError(f"verdict {self.kind} carries the reward {self.reward!r}")
        elif not isinstance(self.reward, float) or not math.isfinite(self.reward):
            raise ValueError(f"verdict {self.kind} carries the reward {self.reward!r}")

    @classmethod
    def scored(cls, reward: float, reason: str = "") -> Verdict:
        return cls(PASS if reward > 0 else FAIL, float(reward), reason)


class Verifier(Protocol):
    def __call__(self, text: str, reference: dict[str, Any], **args: Any) -> float | Verdict: ...


def as_verdict(value: object, name: str) -> Verdict:
    """What rule `name` returned, as a verdict; anything but a finite number is an `error`."""
    if isinstance(value, Verdict):
        return value
    if not isinstance(value, Real):
        return Verdict(ERROR, None, f"{name} returned a {type(value).__name__}, not a number")
    reward = float(value)
    if not fits_float32(reward):
        return Verdict(ERROR, None, f"{name} returned {reward}, not a finite number in float32")
    return Verdict.scored(reward)


def fits_float32(reward: float) -> bool:
    """Rewards travel as float32: what is not finite there is none."""
    return abs(reward) <= _LARGEST


def check_extract(extract: str) -> None:
    """Raise `UserError` when `extract` is not one of `Extract`."""
    if extract not in get_args(Extract):
        raise UserError(f"extract={extract!r} is none of {', '.join(get_args(Extract))}")


def extract_answer(text: str, how: str) -> str | None:
    """The answer `text` gives, or None where it gives none.

    `full`: all of it. `last_line`: the last line that is not blank. `last_number`: the last
    decimal number, without thousands separators. `boxed`: what the last `\\boxed{}` holds.
    `answer_tag`: what the last `<answer></answer>` holds.
    """
    if how == "boxed":
        return last_boxed(text)
    if how == "answer_tag":
        tagged = _ANSWER_TAG.findall(text)
        return str(tagged[-1]).strip() if tagged else None
    if how == "last_number":
        numbers = NUMBER.findall(text.replace("\N{MINUS SIGN}", "-"))
        return str(numbers[-1]).replace(",", "") if numbers else None
    lines = text.strip().splitlines()
    if how == "last_line":
        return lines[-1].strip() if lines else None
    return text.strip() or None


def last_boxed(text: str) -> str | None:
    """What the last complete `\\boxed{...}` of `text` holds, braces inside it balanced."""
    for match in reversed(list(_BOXED.finditer(text))):
        end = _closing(text, match.end())
        if end is not None:
            return text[match.end() : end].strip()
    return None


def last_boxes(text: str) -> list[str]:
    """What the last `\\boxed{...}` holds, and those before it that are named with it.

    `\\boxed{1} and \\boxed{2}` is one answer of two parts; between other boxes stand words, and a
    later one replaces an earlier one.
    """
    found: list[tuple[int, int, str]] = []
    for match in _BOXED.finditer(text):
        end = _closing(text, match.end())
        if end is None:
            continue
        while found and found[-1][1] > match.start():  # the inner box of two is the answer
            found.pop()
        found.append((match.start(), end + 1, text[match.end() : end].strip()))
    first = len(found) - 1
    while first > 0 and _LINK.fullmatch(text[found[first - 1][1] : found[first][0]]):
        first -= 1
    return [content for _, _, content in found[max(first, 0) :]]


def after_thinking(text: str) -> str:
    """What follows the last `</think>`: an answer inside the thoughts is none."""
    return text.rpartition("</think>")[2]


def _closing(text: str, start: int) -> int | None:
    """Where the brace that was opened just before `start` is closed."""
    depth = 1
    for end in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return end
    return None
