"""Multiple choice: the letter that a completion gives against the stored one."""

from __future__ import annotations

import re
from typing import Any

from actors.verifiers.base import Verdict, after_thinking, last_boxes

LETTERS = "ABCDEFGHIJ"

_WRAPPED = r"[\s*_$({\[]*(?:\\(?:text|mathrm|textbf|mathbf)\s*\{)?\(?\s*([A-J])(?![A-Za-z])"
_SAID = re.compile(
    rf"(?i:\b(?:answer|choice|option)(?:\s+is|\s*:|\s+would\s+be|\s+must\s+be)+\s*"
    rf"(?:option|choice)?)\s*:?{_WRAPPED}"
)
_ALONE = re.compile(rf"{_WRAPPED}[\s*_$)}}\].:]*")
_SPACES = re.compile(r"\s+")
_BOX = re.compile(rf"{_WRAPPED}(?:[\s*_$)}}\].:]*|[).:}}].*)", re.DOTALL)


def check_args() -> None:
    """It takes none."""


def score(text: str, reference: dict[str, Any]) -> Verdict:
    """1.0 when the letter in `text` is `reference["answer"]`, else 0.0; the options do not count.

    Raises: `ValueError` when the stored answer is no letter.
    """
    stored = str(reference.get("answer") or "").strip()
    if len(stored) != 1 or stored not in LETTERS:
        raise ValueError(f"the stored answer {stored[:20]!r} is none of the letters {LETTERS}")
    given = vote(text, reference)
    if given is None:
        return Verdict.scored(0.0, "no letter found")
    return Verdict.scored(float(given == stored), f"answer {given}, stored {stored}")


def vote(text: str, reference: dict[str, Any]) -> str | None:
    """The letter in the last `\\boxed{}`, else behind the last `answer is` or `Answer:`, else on a
    last line of nothing else. None where there is no such place: a letter in prose may be a word.
    What stands before `</think>` does not count."""
    text = after_thinking(text)
    boxes = last_boxes(text)
    if boxes:
        boxed = _BOX.fullmatch(_squeezed(boxes[-1])) if len(boxes) == 1 else None
        return boxed[1] if boxed else None
    said = _SAID.findall(_squeezed(text))
    if said:
        return str(said[-1])
    lines = text.strip().splitlines()
    alone = _ALONE.fullmatch(_squeezed(lines[-1].strip())) if lines else None
    return alone[1] if alone else None


def _squeezed(text: str) -> str:
    """`text` with one space for many: the expressions above try every share of a long run."""
    return _SPACES.sub(" ", text)
