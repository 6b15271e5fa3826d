"""Multiple choice: the letter that a completion gives against the stored one."""

from __future__ import annotations

import re
import unicodedata
from typing import Any

from actors.verifiers.base import Verdict
from actors.verifiers.extract import last_boxes, last_tagged
from actors.verifiers.thoughts import answer_part

LETTERS = "ABCDEFGHIJ"

_MACRO = r"(?:\\(?:text|mathrm|textbf|mathbf)\s*\{)?"
_WRAPPED = rf"[\s*_`$({{\[]*{_MACRO}\(?\s*([A-J])(?![A-Za-z'’])"
_SAID = re.compile(
    rf"(?:(?i:\b(?:answer|choice|option)(?:\s+is|\s*:|\s+would\s+be|\s+must\s+be|\s*=)+\s*"
    rf"(?:option|choice)?)|答案\s*(?:是|为|選|选)?)\s*:?{_WRAPPED}"
)
_OTHER = re.compile(r"[\s*_`$)}\].]*(?:/|,?\s*\b(?:or|and)\b)[\s*_`$({\[]*[A-J](?![A-Za-z])")
"""Behind a letter: another one beside it, so that neither is the answer."""
_ALONE = re.compile(rf"{_WRAPPED}[\s*_`$)}}\].:]*")
_SPACES = re.compile(r"\s+")
_BOX = re.compile(rf"{_WRAPPED}(?:[\s*_`$)}}\].:]*|[).:}}].*)", re.DOTALL)


def check_args() -> None:
    """It takes none."""


def score(
    text: str, reference: dict[str, Any], finish_reason: str = "", prompt: str = ""
) -> Verdict:
    """1.0 when the letter in `text` is `reference["answer"]`, else 0.0; the options do not count.

    Raises: `ValueError` when the stored answer is no letter.
    """
    stored = _stored(reference)
    given = _letter(answer_part(text, prompt), complete=finish_reason != "length")
    if given is None:
        return Verdict.scored(0.0, "no letter found")
    return Verdict.scored(float(given == stored), f"answer {given}, stored {stored}")


def check_reference(reference: dict[str, Any]) -> None:
    """Raise `ValueError` when the stored answer is no letter."""
    _stored(reference)


def _stored(reference: dict[str, Any]) -> str:
    stored = str(reference.get("answer") or "").strip().strip("()")
    if len(stored) != 1 or stored not in LETTERS:
        raise ValueError(f"the stored answer {stored[:20]!r} is none of the letters {LETTERS}")
    return stored


def vote(text: str, reference: dict[str, Any]) -> str | None:
    """The letter that `score` would compare; None where a text gives none."""
    return _letter(answer_part(text), complete=True)


def _letter(text: str, complete: bool) -> str | None:
    """The letter in the last `\\boxed{}`, else in the last answer tag, else behind the last
    `answer is` or `Answer:`, else on a last line of nothing else. None where there is no such
    place: a letter in prose may be a word, and one at a cut may be the first of one."""
    text = unicodedata.normalize("NFKC", text)
    boxes = last_boxes(text)
    if boxes:
        boxed = _BOX.fullmatch(_squeezed(boxes[-1])) if len(boxes) == 1 else None
        return boxed[1] if boxed else None
    tagged = last_tagged(text)
    if tagged is not None:
        inside = _BOX.fullmatch(_squeezed(tagged))
        if inside:
            return inside[1]
        text, complete = tagged, True
    plain = _squeezed(text)
    said = [found for found in _SAID.finditer(plain) if complete or found.end() < len(plain)]
    if said:
        return None if _OTHER.match(plain, said[-1].end()) else said[-1][1]
    lines = text.strip().splitlines() if complete else []
    alone = _ALONE.fullmatch(_squeezed(lines[-1].strip())) if lines else None
    return alone[1] if alone else None


def _squeezed(text: str) -> str:
    """`text` with one space for many: the expressions above try every share of a long run."""
    return _SPACES.sub(" ", text)
