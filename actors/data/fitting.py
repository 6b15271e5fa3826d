"""Which built-in rule fits a data set whose user named none.

    code_tests     the rows have tests
    choice         the answers are letters
    math_answer    the answers are short: numbers, expressions, a few words

A rule fits where it could judge nine rows of ten. Long texts fit none: no rule can tell whether
an essay is right. Nor do letters or numbers of options that the question does not show.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from actors.data.schemas import Row
from actors.verifiers import choice, code_tests, math_answer

_FITTING_SHARE = 0.9
_OPTIONS = ("choices", "options")
"""Columns with the options of a question, where they are not in its text."""
_MOST_CHARACTERS, _MOST_WORDS = 200, 8
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")


def fitting_rule(rows: Sequence[Row]) -> str | None:
    """The name of the first rule that fits `rows`; None where none does."""
    references = [json.loads(row.reference) for row in rows]
    for name, check in _CHECKS.items():
        fitting = sum(_passes(check, reference) for reference in references)
        if fitting >= _FITTING_SHARE * len(references):
            return name
    return None


def _passes(check: Callable[[dict[str, Any]], None], reference: dict[str, Any]) -> bool:
    try:
        check(reference)
    except ValueError:
        return False
    return True


def _check_choice(reference: dict[str, Any]) -> None:
    """Raise `ValueError` for what is no letter, or a letter of options that nobody is shown."""
    choice.check_reference(reference)
    _check_shown(reference)


def _check_shown(reference: dict[str, Any]) -> None:
    options = next((reference[name] for name in _OPTIONS if reference.get(name)), None)
    if isinstance(options, dict):
        options = options.get("text")
    question = str(reference.get("prompt"))
    if isinstance(options, list) and not all(str(option) in question for option in options):
        raise ValueError("the question does not show its options")


def _check_short(reference: dict[str, Any]) -> None:
    """Raise `ValueError` for an answer that `math_answer` would compare as a long text."""
    math_answer.check_reference(reference)
    _check_shown(reference)
    stored = math_answer.stored_answer(reference)
    if isinstance(reference["answer"], dict | list):
        raise ValueError("the answer is no text")  # noqa: TRY004
    if len(stored) > _MOST_CHARACTERS or len(_WORD.findall(stored)) > _MOST_WORDS:
        raise ValueError(f"the answer is a text of {len(stored)} characters")


_CHECKS = {
    "code_tests": code_tests.check_reference,
    "choice": _check_choice,
    "math_answer": _check_short,
}
