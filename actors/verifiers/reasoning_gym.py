"""A reasoning-gym task's own scorer (`score_answer`), and its entries as JSON.

Measured on reasoning-gym 0.1.25: 73 of its 106 tasks have a scorer of their own; the common one
gives len(right)/len(given) to any answer that contains the right one (0.5 to 13 where 3 is
right), and many give 0.01 to 0.05 to anything. Hence `partial_credit=False`: less than full
marks counts 0. Turn it on for a task whose grades mean something.

Nine of its scorers evaluate the answer as Python, which could then do as it likes with the process
that knows the right one. Here they read literals and mathematics alone. Two count the numbers of an
answer by a pattern that `0x1f` and `1e1` go past; theirs are counted before (`_HELD`).
"""

from __future__ import annotations

import ast
import importlib
import json
import re
import warnings
from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache
from typing import Any

from actors.sandbox.blame import blame_completion
from actors.verifiers.base import Verdict
from actors.verifiers.expressions import read_safely
from actors.verifiers.extract import NUMBER, Extract, check_extract, extract_answer
from actors.verifiers.thoughts import answer_part
from common.errors import VerifierError

_TUPLE, _ITEMS = "__tuple__", "__items__"
_LONGEST = 20_000
"""Characters of the longest answer that a task's scorer is given."""
_EVALUATING = (
    *("algorithmic.binary_matrix", "algorithmic.spiral_matrix", "algorithmic.string_insertion"),
    "games.n_queens",
)
"""Modules of the package whose scorers call `eval` on the answer, for a list of literals."""
_ARITHMETIC = re.compile(r"(?:\d+|[-+()\s]|\*(?!\*)|/(?!/))*", re.ASCII)


def import_reasoning_gym() -> Any:
    """The package, without the syntax warnings its modules give when first compiled."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import reasoning_gym
    return reasoning_gym


def encode_entry(value: Any) -> Any:
    """`value` as JSON values; tuples and keys that are not strings survive (scorers need them).

    Raises: `TypeError` for a value that JSON cannot hold.
    """
    if isinstance(value, tuple):
        return {_TUPLE: [encode_entry(item) for item in value]}
    if isinstance(value, list):
        return [encode_entry(item) for item in value]
    if isinstance(value, dict):
        if all(isinstance(key, str) for key in value):
            return {key: encode_entry(item) for key, item in value.items()}
        return {_ITEMS: [[encode_entry(k), encode_entry(v)] for k, v in value.items()]}
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    raise TypeError(f"a {type(value).__name__} has no JSON form")


def decode_entry(value: Any) -> Any:
    """The inverse of `encode_entry`."""
    if isinstance(value, list):
        return [decode_entry(item) for item in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {_TUPLE}:
        return tuple(decode_entry(item) for item in value[_TUPLE])
    if value.keys() == {_ITEMS}:
        return {decode_entry(k): decode_entry(v) for k, v in value[_ITEMS]}
    return {key: decode_entry(item) for key, item in value.items()}


def check_args(extract: Extract = "last_number", partial_credit: bool = False) -> None:
    """Raise `UserError` for an unknown `extract`."""
    check_extract(extract)


def warm_up() -> None:
    _gym()


def score(
    text: str,
    reference: dict[str, Any],
    extract: Extract = "last_number",
    partial_credit: bool = False,
    prompt: str = "",
) -> Verdict:
    """The task's score of the answer found in `text`; a text without an answer fails.

    `last_number` applies where the stored answer is a decimal number; where it is not, the
    last line is taken instead.
    Raises: `ValueError` when the prompt did not come from reasoning-gym.
    """
    if not reference.get("task"):
        raise ValueError("the prompt is no reasoning-gym task: use data.source=reasoning_gym")
    entry = decode_entry(reference["entry"])
    stored = entry["answer"]
    scorer = _scorer(reference["task"], json.dumps(reference.get("params") or {}, sort_keys=True))
    blame_completion()
    answer = _given(answer_part(text, prompt), stored, extract)
    if answer is None:
        return Verdict.scored(0.0, f"no answer ({extract})")
    if len(answer) > _LONGEST:
        return Verdict.scored(0.0, f"an answer of {len(answer)} characters is none")
    held = _HELD.get(entry["metadata"].get("source_dataset", ""))
    if held is not None and not held(answer, entry):
        return Verdict.scored(0.0, f"answer {answer[:80]!r} is not made of the numbers given")
    grade = _grade(scorer, answer, entry)
    if grade < 1.0 and not partial_credit:
        grade = 0.0
    return Verdict.scored(grade, f"answer {answer[:80]!r}, stored {str(stored)[:80]!r}")


def vote(
    text: str,
    reference: dict[str, Any],
    extract: Extract = "last_number",
    partial_credit: bool = False,
) -> str | None:
    """The answer that `score` would grade, white space and case aside; a number as a number."""
    answer = _given(answer_part(text), reference.get("answer"), extract)
    if answer is None:
        return None
    try:
        return str(Fraction(answer))
    except (ValueError, ZeroDivisionError):
        return " ".join(answer.lower().split())


def _given(text: str, stored: object, extract: Extract) -> str | None:
    if extract == "last_number" and not (isinstance(stored, str) and NUMBER.fullmatch(stored)):
        extract = "last_line"
    return extract_answer(text, extract)


def _made_of_the_numbers(answer: str, entry: dict[str, Any]) -> bool:
    """Whether an answer is arithmetic in which each number of the question stands once."""
    if not _ARITHMETIC.fullmatch(answer):
        return False
    used = [int(number) for number in re.findall(r"\d+", answer)]
    return sorted(used) == sorted(entry["metadata"]["numbers"])


_HELD: dict[str, Callable[[str, dict[str, Any]], bool]] = {
    "countdown": _made_of_the_numbers,
    "puzzle24": _made_of_the_numbers,
}
"""What an answer must be before the task's scorer sees it, where that one would be taken in."""


def _grade(scorer: Any, answer: str, entry: dict[str, Any]) -> float:
    try:
        return float(scorer.score_answer(answer, entry))
    except Exception:
        # Some scorers raise on text that is no answer at all. One that can mark the stored
        # answer is sound, so what it choked on is a wrong answer and not a broken verifier.
        try:
            scorer.score_answer(entry["answer"], entry)
        except Exception as error:
            raise VerifierError(f"the task cannot mark its own answer: {error}") from error
        return 0.0


@lru_cache(maxsize=32)
def _scorer(task: str, params: str) -> Any:
    return _gym().create_dataset(task, **json.loads(params))


@lru_cache
def _gym() -> Any:
    """The package, its scorers kept from running an answer."""
    gym = import_reasoning_gym()
    read_safely()
    for name in _EVALUATING:
        vars(importlib.import_module(f"reasoning_gym.{name}"))["eval"] = ast.literal_eval
    return gym
