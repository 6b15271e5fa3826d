"""What a verifier is, and what it may say.

A verifier is any callable `score(text, reference, **args) -> float | Verdict`: `text` is one
completion, `reference` what the data say of its question (`prompt`, `answer`, every other column of
the row), `args` what the configuration gives the rule. A rule that has a parameter `finish_reason`
is told why the completion ended (`stop`, `length`, or an empty text where nobody knows). One that
has a parameter `prompt` is told what the policy read, template included.
"""

from __future__ import annotations

from collections.abc import Callable
from numbers import Real
from typing import Any, Protocol

from actors.sandbox.verdict import Verdict
from common.record.schema import ERROR

__all__ = ["Verdict", "Verifier", "as_verdict", "fits_float32"]

_LARGEST = float.fromhex("0x1.fffffep+127")
"""Of float32."""


class Verifier(Protocol):
    def __call__(self, text: str, reference: dict[str, Any], **args: Any) -> float | Verdict: ...


ReferenceCheck = Callable[[dict[str, Any]], None]
"""Raises `ValueError` for a reference that no completion could satisfy."""


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
