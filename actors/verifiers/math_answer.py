"""Mathematical equality with the stored answer, by math-verify.

Numbers, fractions, roots, expressions, intervals, sets, tuples and matrices are compared as
mathematics; an answer of plain words, or a letter of a choice, as text without case.
Limits of math-verify 0.9, which are ours too: units are dropped (`5 cm` equals `5 km` and 5),
`a:b` is a ratio (`12:30` equals 2/5), a list equals a tuple (`3, 4` and `(3, 4)`) and numbers agree
when they do to six decimals; those below 1e-4, of which six decimals say little, when they do to
one part in a thousand.

math-verify stops itself by SIGALRM, so this runs on a process's main thread only.
"""

from __future__ import annotations

import math
import re
from fractions import Fraction
from typing import Any

from actors.verifiers.base import (
    NUMBER,
    Extract,
    Verdict,
    after_thinking,
    check_extract,
    extract_answer,
    last_boxes,
)
from common.record.schema import TIMEOUT

SECONDS = 4
"""Limit of one parse and of one comparison, whole seconds; below the pool's usual deadline."""

_WORDS = re.compile(r"[A-Za-z]+(?:[ '-][A-Za-z]+)*")
_TEXT_MACRO = re.compile(r"\\(?:text|mathrm|textbf|mathbf)\s*\{([^{}]*)\}")
_DELIMITED = re.compile(r"\$|\\\(|\\\[|\\boxed")
_FORMULA = re.compile(r"\$+([^$]+)\$+|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
_PROSE = re.compile(r"[A-Za-z]{2,}\W+[A-Za-z]{2,}")
_ANSWER_IS = re.compile(r".*(?:\banswer\s+is|\banswer)\b\s*:?", re.IGNORECASE)
_LABEL = re.compile(r"[A-Za-z]{3}")
_SYMBOLS = frozenset({"pi", "e", "i", "oo", "inf", "infinity", "infty"})
_SPELLINGS = (
    # What math-verify does not read, and the same as it does.
    (re.compile(r"\\\$"), ""),  # a dollar sign of money
    (re.compile(r"(?<=\d)(?:\\[,!;: ]|\{,\}|,(?=\\!))+,?(?=\d{3}(?!\d))"), ""),  # 1\,000 1{,}000
    (re.compile(r"(?<![\w.\\])(\d+(?:\.\d+)?)[eE]([+-]?\d+)(?![\w.])"), r"\1 \\times 10^{\2}"),
    (re.compile(r"(?<![\d./])(\d+) (\d+)/(\d+)(?![\d/])"), r"\1\\frac{\2}{\3}"),  # 2 1/2
)
_SEARCHED = 1_000
"""Characters at the end of a completion in which an answer without a box is looked for."""
_LONGEST = 1_000
"""Characters of the longest answer that is read as mathematics."""
_SMALL, _SMALL_TOLERANCE = 1e-4, 1e-3


def check_args(extract: Extract = "full") -> None:
    """Raise `UserError` for an unknown `extract`."""
    check_extract(extract)


def warm_up() -> None:
    _parse("$1$")


def score(text: str, reference: dict[str, Any], extract: Extract = "full") -> Verdict:
    """1.0 when the answer in `text` equals `reference["answer"]`, else 0.0.

    A stored answer holding `####` counts from there on, as in GSM8K. With `extract=full` the
    answer is the last `\\boxed{}` (those linked to it by `and`, `or` or a comma with it), else the
    last formula between dollars, else the last line. What stands before `</think>` is no answer.
    Raises: `ValueError` when the stored answer is missing or cannot be read.
    """
    stored = _spelled(str(reference.get("answer") or "").rpartition("####")[2].strip())
    if not stored:
        raise ValueError("the prompt has no stored answer: check data.answer_column")
    answer = _given(text, extract)
    if answer is None:
        return Verdict.scored(0.0, f"no answer ({extract})")
    if len(answer) > _LONGEST:
        return Verdict.scored(0.0, f"an answer of {len(answer)} characters is none")
    words = _as_words(stored)
    if words is not None:
        given = _as_words(_tail(answer))
        return Verdict.scored(float(given == words), f"answer {given!r}, stored {words!r}")
    return _compare(stored, answer, bare=extract in ("boxed", "answer_tag", "last_number"))


def vote(text: str, reference: dict[str, Any], extract: Extract = "full") -> str | None:
    """A spelling of the answer in `text` that equal answers mostly share; None without one.

    For majority votes, where all pairs would have to be compared: numbers are equal as numbers,
    everything else as LaTeX without white space and sizes of brackets. So `x^2+1` and `1+x^2` are
    two answers to a vote, though one to `score`.
    """
    answer = _given(text, extract)
    if answer is None or len(answer) > _LONGEST:
        return None
    formulas = [] if last_boxes(answer) else _FORMULA.findall(answer)
    tail = "".join(formulas[-1]) if formulas else _tail(answer)
    words = _as_words(tail)
    if words is not None:
        return words
    if not _DELIMITED.search(tail) and _PROSE.search(tail):
        numbers = NUMBER.findall(tail)
        tail = numbers[-1] if numbers else tail
    return _normal(tail) or None


def _given(text: str, extract: str) -> str | None:
    """The answer of a completion, its boxes as one."""
    text = after_thinking(text)
    boxes = last_boxes(text) if extract == "full" else []
    if boxes:
        found = ", ".join(box.rstrip(". ") for box in boxes)
        return _spelled(f"\\boxed{{{found}}}") if len(found) <= _LONGEST else found
    if extract in ("full", "last_line", "last_number"):
        return extract_answer(_spelled(_last_lines(text)), extract)
    answer = extract_answer(text, extract)
    return answer if answer is None or len(answer) > _LONGEST else _spelled(answer)


def _last_lines(text: str) -> str:
    """The lines at the end of `text` that have `_SEARCHED` characters, or the end of the last."""
    end = text.rstrip()[-_SEARCHED:]
    if len(end) < _SEARCHED:
        return end
    _, line_feed, lines = end.partition("\n")
    return lines if line_feed else end


def _spelled(text: str) -> str:
    for pattern, plain in _SPELLINGS:
        text = pattern.sub(plain, text)
    return _TEXT_MACRO.sub(_number_of, text)


def _number_of(macro: re.Match[str]) -> str:
    """`\\text{7 m}` without the macro, which math-verify would drop with the number in it."""
    return macro[1] if any(map(str.isdigit, macro[1])) else macro[0]


def _normal(expression: str) -> str:
    """An expression without what does not matter; a number as a fraction in lowest terms."""
    plain = _TEXT_MACRO.sub("", expression).replace("\N{MINUS SIGN}", "-")
    plain = re.sub(r"\\(?:left|right|displaystyle|,|!|;|:| )|[\s$]|\^\{?\\circ\}?", "", plain)
    plain = re.sub(r"\\[dt]frac", r"\\frac", plain).rstrip(".,")
    plain = re.sub(r"^[A-Za-z]=", "", plain)
    number = re.sub(r"\\frac(?:\{(\d+)\}\{(\d+)\}|(\d)(\d))", r"\1\3/\2\4", plain)
    number = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", number)
    percent = number.endswith("%")
    try:
        value = Fraction(number.rstrip("\\%"))
    except (ValueError, ZeroDivisionError):
        return plain
    return f"{value}%" if percent else str(value)


def _compare(stored: str, answer: str, bare: bool) -> Verdict:
    """Equality as mathematics; a `bare` answer is an expression without prose around it."""
    from math_verify import verify
    from math_verify.errors import TimeoutException

    try:
        gold = _parse(stored if _DELIMITED.search(stored) else f"\\boxed{{{stored}}}")
    except TimeoutException:
        return Verdict(TIMEOUT, None, f"the stored answer was not read within {SECONDS} s")
    if not gold:
        raise ValueError(f"the stored answer {stored[:80]!r} cannot be read as mathematics")
    # The stored answer has been read, so what cannot be compared from here on is the completion's.
    try:
        given = _parse(_delimit(answer, bare))
        right = verify(gold, given, timeout_seconds=SECONDS, raise_on_error=True)
        right = right and _same_if_small(gold[0], given[0])
    except TimeoutException:
        return Verdict.scored(0.0, f"not comparable within {SECONDS} s")
    except Exception as error:
        return Verdict.scored(0.0, f"not comparable: {type(error).__name__}")
    return Verdict.scored(float(right), "" if given else "no expression found")


def _same_if_small(gold: Any, given: Any) -> bool:
    """Whether numbers near 0 agree in more than being near 0; True of all else."""
    try:
        stored, answer = float(gold), float(given)
    except (TypeError, ValueError):
        return True
    return not 0 < abs(stored) < _SMALL or math.isclose(stored, answer, rel_tol=_SMALL_TOLERANCE)


def _parse(text: str) -> list[Any]:
    from math_verify import parse

    found: list[Any] = parse(text, parsing_timeout=SECONDS, raise_on_error=True)
    return found


def _delimit(answer: str, bare: bool) -> str:
    """`answer` so that math-verify reads all of the final expression.

    Outside delimiters it sees single numbers only: the 1 of `(0, 1]`.
    """
    if _DELIMITED.search(answer):
        return answer
    tail = answer if bare else _tail(answer)
    return answer if _PROSE.search(tail) else f"\\boxed{{{tail}}}"


def _tail(answer: str) -> str:
    """The final answer of a text: its last box, or its last line after `answer is` or a colon."""
    boxes = last_boxes(answer)
    if boxes:
        return ", ".join(boxes)
    line = (extract_answer(answer, "last_line") or "").replace("**", "")
    said = _ANSWER_IS.match(line)
    label, colon, rest = line.partition(":")
    if said:
        line = line[said.end() :]
    elif colon and _LABEL.search(label.rstrip()[-3:]):
        line = rest
    return line.strip().rstrip(".").strip()


def _as_words(expression: str) -> str | None:
    """The words of an expression made of nothing else, in lower case; None for mathematics."""
    plain = _TEXT_MACRO.sub(r"\1", expression).strip().strip("$").strip("().").strip().lower()
    if not _WORDS.fullmatch(plain) or plain in _SYMBOLS:
        return None
    return " ".join(plain.split())
