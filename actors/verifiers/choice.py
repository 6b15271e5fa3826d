"""Multiple choice: the letter that a completion gives against the stored one."""

from __future__ import annotations

import re
import unicodedata
from typing import Any

from actors.sandbox.blame import blame_completion
from actors.verifiers.base import Verdict
from actors.verifiers.extract import last_boxes, last_tagged
from actors.verifiers.thoughts import answer_part

LETTERS = "ABCDEFGHIJ"

_MACRO = r"(?:\\(?:text|mathrm|textbf|mathbf)\s*\{)?"
_AROUND = r"\s*_`$({\[\\<\"'“”‘’"
"""What stands around a letter: emphasis, brackets, quotation marks, the ends of a formula."""
_WRAPPED = rf"[{_AROUND}*]*{_MACRO}\(?\s*([A-J])(?![A-Za-z'’]\w)(?![A-Za-z])"
_RIGHT = r"(?:the\s+)?(?:correct|right|best)"
_SAID = re.compile(
    rf"(?:(?i:\b(?:answer|choice|option)[\"']?(?:\s+is|\s*:|\s+would\s+be|\s+must\s+be|\s*=)+\s*"
    rf"(?:option|choice)?)"
    rf"|(?i:(?<!not )(?<!n't )(?<!n’t )\b(?:choose|select|pick)\s+(?:option|choice|answer)?)"
    rf"|(?:答案|[选選])\s*(?:是|为|為|选|選|择|擇)?)\s*:?{_WRAPPED}"
)
_NAMED = re.compile(
    rf"(?:\A|[.!?]\s+|(?i:\b(?:so|thus|therefore|hence),?\s+)|(?i:\b(?:option|choice|answer)\s+))"
    rf"{_WRAPPED}[{_AROUND})\].]*\s+is\s+{_RIGHT}\b"
)
_OTHER = re.compile(r"[\s*_`$)}\].]*(?:/|,?\s*\b(?:or|and)\b)[\s*_`$({\[]*[A-J](?![A-Za-z])")
"""Behind a letter: another one beside it, so that neither is the answer."""
_ALONE = re.compile(rf"{_WRAPPED}[{_AROUND}*)}}\].:>]*")
_LISTED = re.compile(r"^[\s*_(]*([A-J])[).:](?:[\s*_]|$)", re.MULTILINE)
"""A line that begins with a letter as options do."""
_SPACES = re.compile(r"\s+")
_BOX = re.compile(rf"{_WRAPPED}(?:[{_AROUND}*)}}\].:>]*|[).:}}].*)", re.DOTALL)
_SMALL = re.compile(rf"[{_AROUND}*]*{_MACRO}\(?\s*([a-j])[{_AROUND}*)}}\].:>]*")


def check_args() -> None:
    """It takes none."""


def score(
    text: str, reference: dict[str, Any], finish_reason: str = "", prompt: str = ""
) -> Verdict:
    """1.0 when the letter in `text` is `reference["answer"]`, else 0.0; the options do not count.

    Raises: `ValueError` when the stored answer is no letter.
    """
    stored = _stored(reference)
    blame_completion()
    given = _letter(answer_part(text, prompt), complete=finish_reason != "length")
    if given is None:
        return Verdict.scored(0.0, "no letter found")
    return Verdict.scored(float(given == stored), f"answer {given}, stored {stored}")


def check_reference(reference: dict[str, Any]) -> None:
    """Raise `ValueError` when the stored answer is no letter."""
    _stored(reference)


def _stored(reference: dict[str, Any]) -> str:
    """The stored letter, also from `(b)`, `B.`, `\\text{B}` and `B) the option`."""
    stored = str(reference.get("answer") or "").strip()
    found = _boxed(stored)
    if found is None:
        raise ValueError(f"the stored answer {stored[:20]!r} is none of the letters {LETTERS}")
    return found


def vote(text: str, reference: dict[str, Any]) -> str | None:
    """The letter that `score` would compare; None where a text gives none."""
    return _letter(answer_part(text), complete=True)


def _letter(text: str, complete: bool) -> str | None:
    """The letter in the last `\\boxed{}`, else in the last answer tag, else behind the last
    `answer is`, `Answer:` or before `is correct`, else on a last line of nothing else or of an
    option. None where there is no such place: a letter in prose may be a word, and one at a cut may
    be the first of one."""
    text = unicodedata.normalize("NFKC", text)
    boxes = last_boxes(text)
    if boxes:
        return _boxed(boxes[-1]) if len(boxes) == 1 else None
    tagged = last_tagged(text)
    if tagged is not None:
        inside = _boxed(tagged)
        if inside:
            return inside
        text, complete = tagged, True
    plain = _squeezed(text)
    found = sorted([*_SAID.finditer(plain), *_NAMED.finditer(plain)], key=re.Match.end)
    said = [one for one in found if complete or one.end() < len(plain)]
    if said:
        return None if _OTHER.match(plain, said[-1].end()) else said[-1][1]
    return _last_line(text) if complete else None


def _boxed(content: str) -> str | None:
    """The letter that a box, a tag or a data set holds: alone, also small, or before its option."""
    plain = _squeezed(content)
    found = _BOX.fullmatch(plain) or _SMALL.fullmatch(plain)
    return found[1].upper() if found else None


def _last_line(text: str) -> str | None:
    """The letter on a last line of nothing else, or of the only option that the text lists."""
    lines = text.strip().splitlines()
    if not lines:
        return None
    alone = _ALONE.fullmatch(_squeezed(lines[-1].strip()))
    if alone:
        return alone[1]
    listed = [_LISTED.match(line) for line in lines]
    return listed[-1][1] if listed[-1] and sum(map(bool, listed)) == 1 else None


def _squeezed(text: str) -> str:
    """`text` with one space for many: the expressions above try every share of a long run."""
    return _SPACES.sub(" ", text)
