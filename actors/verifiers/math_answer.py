"""Mathematical equality with the stored answer, by math-verify.

Numbers, fractions, roots, expressions, intervals, sets, tuples and matrices are compared as
mathematics; an answer of plain words, or a letter of a choice, as text without case.
Limits of math-verify 0.9, which are ours too: units are dropped (`5 cm` equals `5 km` and 5),
`a:b` is a ratio (`12:30` equals 2/5), and numbers agree when they do to six decimals.

math-verify stops itself by SIGALRM, so this runs on a process's main thread only.
"""

from __future__ import annotations

import re
from typing import Any

from actors.verifiers.base import Extract, Verdict, check_extract, extract_answer, last_boxed
from common.schema import TIMEOUT

SECONDS = 4
"""Limit of one parse and of one comparison, whole seconds; below the pool's usual deadline."""

_WORDS = re.compile(r"[A-Za-z]+(?:[ '-][A-Za-z]+)*")
_TEXT_MACRO = re.compile(r"\\(?:text|mathrm|textbf|mathbf)\s*\{([^{}]*)\}")
_DELIMITED = re.compile(r"\$|\\\(|\\\[|\\boxed")
_PROSE = re.compile(r"[A-Za-z]{2,}\W+[A-Za-z]{2,}")
_LEAD = re.compile(r".*(?:\banswer\s+is|\banswer)\b\s*:?|^[^:]*[A-Za-z]{3,}\s*:", re.IGNORECASE)
_SYMBOLS = frozenset({"pi", "e", "i", "oo", "inf", "infinity", "infty"})


def check_args(extract: Extract = "full") -> None:
    """Raise `UserError` for an unknown `extract`."""
    check_extract(extract)


def warm_up() -> None:
    _parse("$1$")


def score(text: str, reference: dict[str, Any], extract: Extract = "full") -> Verdict:
    """1.0 when the answer in `text` equals `reference["answer"]`, else 0.0.

    A stored answer holding `####` counts from there on, as in GSM8K. With `extract=full` the
    answer is the last `\\boxed{}`, else the last formula between dollars, else the last line.
    Raises: `ValueError` when the stored answer is missing or cannot be read.
    """
    stored = str(reference.get("answer") or "").rpartition("####")[2].strip()
    if not stored:
        raise ValueError("the prompt has no stored answer: check data.answer_column")
    answer = extract_answer(text, extract)
    if answer is None:
        return Verdict.scored(0.0, f"no answer ({extract})")
    words = _as_words(stored)
    if words is not None:
        given = _as_words(_tail(answer))
        return Verdict.scored(float(given == words), f"answer {given!r}, stored {words!r}")
    return _compare(stored, answer, bare=extract in ("boxed", "answer_tag", "last_number"))


def _compare(stored: str, answer: str, bare: bool) -> Verdict:
    """Equality as mathematics; a `bare` answer is an expression without prose around it."""
    from math_verify import verify
    from math_verify.errors import TimeoutException

    gold = _parse(stored if _DELIMITED.search(stored) else f"\\boxed{{{stored}}}")
    if not gold:
        raise ValueError(f"the stored answer {stored[:80]!r} cannot be read as mathematics")
    try:
        given = _parse(_delimit(answer, bare))
        right = verify(gold, given, timeout_seconds=SECONDS, raise_on_error=True)
    except TimeoutException:
        return Verdict(TIMEOUT, None, f"math_answer: no result within {SECONDS} s")
    except Exception as error:
        # The stored answer has been read, so what cannot be compared is the completion's.
        return Verdict.scored(0.0, f"not comparable: {type(error).__name__}")
    return Verdict.scored(float(right), "" if given else "no expression found")


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
    boxed = last_boxed(answer)
    if boxed is not None:
        return boxed
    line = (extract_answer(answer, "last_line") or "").replace("**", "")
    return _LEAD.sub("", line, count=1).strip().rstrip(".").strip()


def _as_words(expression: str) -> str | None:
    """The words of an expression made of nothing else, in lower case; None for mathematics."""
    plain = _TEXT_MACRO.sub(r"\1", expression).strip().strip("$").strip("().").strip().lower()
    if not _WORDS.fullmatch(plain) or plain in _SYMBOLS:
        return None
    return " ".join(plain.split())
