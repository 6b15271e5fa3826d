"""Mathematical equality with the stored answer, by math-verify behind rules of our own.

`actors.verifiers.final_answer` finds what the completion commits itself to, and
`actors.verifiers.equality` compares it. Numbers, fractions, roots, expressions, intervals, sets,
tuples, relations and matrices are compared as mathematics; an answer of words, a clock time, a
sequence with dots or any other text is equal to its own spelling, case aside.

Limits: a unit that one side leaves out does not count, `a:b` is a ratio, a list equals a tuple in
the same order, and decimals agree when they do to six places (below 1e-4: to a part in a thousand).
"""

from __future__ import annotations

from typing import Any

from actors.sandbox.blame import blame_completion
from actors.verifiers.base import Verdict
from actors.verifiers.equality import TooLongError, readable, same, words_of
from actors.verifiers.extract import Extract, check_extract, extract_answer, last_boxes
from actors.verifiers.final_answer import final_answer, whole_answers
from actors.verifiers.mathematics import LONGEST
from actors.verifiers.quantity import quantity
from actors.verifiers.spelling import key, spelled, without_thousands
from actors.verifiers.thoughts import answer_part


def check_args(extract: Extract = "full") -> None:
    """Raise `UserError` for an unknown `extract`."""
    check_extract(extract)


def warm_up() -> None:
    """Import what the first comparison needs."""
    for stored, given in (("x+1", "1+x"), ("[-2,7]", r"-2 \le x \le 7"), ("2x=y", "y/2=x")):
        same(stored, given)


def score(
    text: str,
    reference: dict[str, Any],
    extract: Extract = "full",
    finish_reason: str = "",
    prompt: str = "",
) -> Verdict:
    """1.0 when the answer in `text` equals `reference["answer"]`, else 0.0.

    A stored answer holding `####` counts from there on, as in GSM8K. With `extract=full` the
    answer is what `final_answer` finds. What stands before `</think>` is no answer, nor is
    anything while a thought is open.

    Raises: `ValueError` when the stored answer is missing or nothing can equal it.
    """
    stored = stored_answer(reference)
    blame_completion()
    text = answer_part(text, prompt)
    if extract == "full" and key(stored) in map(key, map(spelled, whole_answers(text))):
        return Verdict.scored(1.0, f"answer {stored[:80]!r}")
    answer = _given(text, extract, complete=finish_reason != "length")
    if answer is None:
        return Verdict.scored(0.0, f"no answer ({extract})")
    if len(answer) > LONGEST:
        return Verdict.scored(0.0, f"an answer of {len(answer)} characters is none")
    try:
        right = same(stored, spelled(answer))
    except TooLongError as error:
        # The stored answer was read at the start of the run: what takes long is the completion's.
        return Verdict.scored(0.0, f"answer {answer[:80]!r}: {error}")
    return Verdict.scored(float(right), f"answer {answer[:80]!r}, stored {stored[:80]!r}")


def vote(text: str, reference: dict[str, Any], extract: Extract = "full") -> str | None:
    """A spelling of the answer in `text` that equal answers mostly share; None without one.

    For majority votes, where all pairs would have to be compared: numbers are equal as numbers,
    everything else by its spelling. So `x^2+1` and `1+x^2` are two answers to a vote, though one
    to `score`.
    """
    answer = _given(answer_part(text), extract, complete=True)
    if answer is None or len(answer) > LONGEST:
        return None
    plain = without_thousands(spelled(answer))
    words = words_of(plain)
    if words is not None:
        return words
    if plain[1:].lstrip().startswith("=") and plain[0].isalpha():
        plain = plain.partition("=")[2].strip()
    found = quantity(plain)
    if found is not None:
        return f"{found.number.value}{'%' if found.percent else ''}"
    return key(plain) or None


def check_reference(reference: dict[str, Any]) -> None:
    """Raise `ValueError` when the stored answer does not pass if it is given back in a box."""
    stored = stored_answer(reference)
    raw = str(reference["answer"]).rpartition("####")[2].strip()
    given = final_answer(rf"\boxed{{{raw}}}")
    if given is None or key(stored) != key(spelled(given)):
        raise ValueError(f"the stored answer {raw[:80]!r} is not right when it is given back")


def stored_answer(reference: dict[str, Any]) -> str:
    """The stored answer, `spelled`: the box of a worked solution, or what stands behind `####`.

    Raises: `ValueError` where there is none to compare with.
    """
    stored = reference.get("answer")
    whole = "" if stored is None else str(stored)
    boxes = last_boxes(whole)
    text = spelled(", ".join(boxes) if boxes else whole.rpartition("####")[2])
    if not readable(text):
        raise ValueError(
            f"the stored answer {str(stored)[:80]!r} is empty: check data.answer_column"
        )
    return text


def _given(text: str, extract: Extract, complete: bool) -> str | None:
    """The answer of a text without thoughts, its boxes as one."""
    if extract == "full":
        return final_answer(text, complete)
    answer = extract_answer(text, extract)
    boxes = last_boxes(answer) if answer else []
    return ", ".join(boxes) if boxes else answer
