"""What a verdict is, and how an answer is found in a text.

A verifier is any callable `score(text, reference, **args) -> float | Verdict`: `text` is one
completion, `reference` the dictionary a prompt carries (`prompt`, `answer`, and for
reasoning-gym `task`, `params`, `entry`), `args` what the configuration gives the rule.
"""

from __future__ import annotations

import re
from numbers import Real
from typing import Any, Literal, NamedTuple, Protocol, get_args

from actors.sandbox.verdict import Verdict
from common.errors import UserError
from common.record.schema import ERROR

__all__ = [
    "NUMBER",
    "Extract",
    "Verdict",
    "Verifier",
    "after_thinking",
    "as_verdict",
    "check_extract",
    "extract_answer",
    "fits_float32",
    "last_boxed",
    "last_boxes",
]

Extract = Literal["full", "last_number", "boxed", "answer_tag", "last_line"]

NUMBER = re.compile(r"(?<![\w.])-?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?")
"""A decimal number. A minus behind a digit or letter is a subtraction, not a sign."""
_ANSWER_TAG = re.compile(r"<(/?)answer>", re.IGNORECASE)
_BRACE = re.compile(r"(\\boxed\s*)?([{}])")
_LINK = re.compile(r"[\s$]*(?:,|;|and|or|,\s*and|,\s*or)[\s$]*")

_LARGEST = float.fromhex("0x1.fffffep+127")
"""Of float32."""


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
        return _last_tagged(text)
    if how == "last_number":
        numbers = NUMBER.findall(text.replace("\N{MINUS SIGN}", "-"))
        return str(numbers[-1]).replace(",", "") if numbers else None
    lines = text.strip().splitlines()
    if how == "last_line":
        return lines[-1].strip() if lines else None
    return text.strip() or None


def last_boxed(text: str) -> str | None:
    """What the last complete `\\boxed{...}` of `text` holds, braces inside it balanced."""
    boxes = _boxes(text)
    return text[boxes[-1].inside : boxes[-1].end - 1].strip() if boxes else None


def last_boxes(text: str) -> list[str]:
    """What the last `\\boxed{...}` holds, and those before it that are named with it.

    `\\boxed{1} and \\boxed{2}` is one answer of two parts; between other boxes stand words, and a
    later one replaces an earlier one.
    """
    found: list[_Box] = []
    for box in _boxes(text):
        while found and found[-1].end > box.start:  # the inner box of two is the answer
            found.pop()
        found.append(box)
    first = len(found) - 1
    while first > 0 and _LINK.fullmatch(text, found[first - 1].end, found[first].start):
        first -= 1
    return [text[box.inside : box.end - 1].strip() for box in found[max(first, 0) :]]


def after_thinking(text: str) -> str:
    """What follows the last `</think>`: an answer inside the thoughts is none."""
    return text.rpartition("</think>")[2]


class _Box(NamedTuple):
    """Where a `\\boxed{...}` starts, where what it holds starts, and where it has ended."""

    start: int
    inside: int
    end: int


def _boxes(text: str) -> list[_Box]:
    """All complete boxes by where they start, in one pass: a text may have a megabyte of braces."""
    opened: list[tuple[int, int] | None] = []
    closed: list[_Box] = []
    for brace in _BRACE.finditer(text):
        if brace[2] == "{":
            opened.append(brace.span() if brace[1] else None)
        elif opened and (box := opened.pop()) is not None:
            closed.append(_Box(*box, brace.end()))
    return sorted(closed)


def _last_tagged(text: str) -> str | None:
    """What the last `<answer></answer>` holds; a tag that opens inside another is text."""
    opened: int | None = None
    last: tuple[int, int] | None = None
    for tag in _ANSWER_TAG.finditer(text):
        if not tag[1]:
            opened = tag.end() if opened is None else opened
        elif opened is not None:
            last, opened = (opened, tag.start()), None
    return text[slice(*last)].strip() if last else None
