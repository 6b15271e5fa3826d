"""A right answer is worth 1, a wrong one by how much of it is right: SGPO, arXiv 2505.11595.

    R = 1 where the answer is right,   else sigmoid(beta (RTS - gamma)) < 1
    RTS = characters before the first wrong step / characters of the answer

So groups of wrong answers alone teach something, and no wrong answer is worth as much as a right
one. `right` is the rule that says whether an answer is right, with full marks. The first wrong step
is found by a function of `first_wrong`, or by the language model of `judge` (`llm_judge`), which is
asked about wrong answers alone.

    sums                   steps such as `3+8=11;11-5=6`, checked against the sum in the question
    package.module:name    (text, reference) -> characters before the first wrong step

The sign of the sigmoid is derived: a third party's code has it falling with RTS. A step may be
wrong where nothing in the answer's text is, as where it ends too soon: then RTS is 1.

Evidence: [P abstract] for R = 1 and f(RTS) < 1, [3P] for beta = 5 and gamma = 0.5, [D] the sign.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

from actors.sandbox.blame import aside
from actors.verifiers.base import ReferenceCheck, Verdict
from actors.verifiers.llm_judge import Judge, judge_of, number_of
from actors.verifiers.thoughts import answer_part
from common.config.names import import_named
from common.errors import UserError, VerifierError
from common.record.schema import ERROR, TIMEOUT

SUMS = "sums"
_ASKED = re.compile(r"-?\d+(?:\s*[+-]\s*\d+)+")
_STEP = re.compile(r"\s*(-?\d{1,18})\s*([+-])\s*(\d{1,18})\s*=\s*(-?\d{1,18})\s*")
_TERM = re.compile(r"([+-])\s*(\d+)")
_STEEPEST = 13.0
"""Where 1 - sigmoid is a few millionths, of which float32 keeps enough."""
_USUAL = {"task": {"name": "reasoning_gym"}, "answer": {"name": "math_answer"}}


def check_args(
    beta: float = 5.0,
    gamma: float = 0.5,
    first_wrong: str | None = None,
    judge: Mapping[str, Any] | None = None,
    separator: str = "\n",
    right: Mapping[str, Any] | None = None,
) -> None:
    """Raise `UserError` for arguments that cannot work."""
    _check_numbers(beta, gamma, first_wrong, judge, separator)
    if first_wrong is not None and first_wrong != SUMS:
        import_named("right_prefix: first_wrong", first_wrong, (SUMS,))
    for each in _USUAL.values() if right is None else (right,):
        _rule(each)  # before the first verdict, which has little time


def reference_check(**args: Any) -> ReferenceCheck:
    """What raises `ValueError` for a row that the rule of `right` refuses, or without its sum."""
    from actors.verifiers.registry import reference_checks
    from common.config.actors import VerifierSpec

    _check_numbers(**args)

    def check(reference: dict[str, Any]) -> None:
        asked = args.get("right") or _usual(reference)
        spec = VerifierSpec(name=str(asked.get("name")), args=dict(asked.get("args") or {}))
        for each in reference_checks([spec]):
            each(reference)
        if args.get("first_wrong") == SUMS:
            _terms(reference)

    return check


def score(
    text: str,
    reference: dict[str, Any],
    beta: float = 5.0,
    gamma: float = 0.5,
    first_wrong: str | None = None,
    judge: Mapping[str, Any] | None = None,
    separator: str = "\n",
    right: Mapping[str, Any] | None = None,
    finish_reason: str = "",
    prompt: str = "",
) -> Verdict:
    """1 for a right answer, and less the sooner a wrong one goes wrong.

    Args:
        separator: what stands between the steps that a judge is shown.

    Raises:
        ValueError: the question has no sum to check steps against, or `first_wrong` gave no place.
        VerifierError: the judge named no step.
    """
    rule = _rule(right or _usual(reference))
    with aside():  # what it blames on the completion is not the judge's fault
        verdict = rule.judge(text, reference, finish_reason, prompt)
    if verdict.kind in (ERROR, TIMEOUT) or (verdict.reward or 0.0) >= 1.0:
        return verdict
    answer = answer_part(text, prompt)
    place: object
    if judge is not None:
        place = _judged(judge_of("right_prefix", judge), answer, reference, separator)
    else:
        place = _finder(first_wrong)(answer, reference)
    if not isinstance(place, int) or not 0 <= place <= len(answer):
        raise ValueError(f"{first_wrong} says {place!r}, which is no place in the answer")
    share = place / len(answer) if answer else 0.0
    reason = f"right up to character {place} of {len(answer)}"
    return Verdict.scored(worth(share, beta, gamma), reason, verdict.suspicious)


def worth(share: float, beta: float, gamma: float) -> float:
    """What a wrong answer is worth whose first part, of this share, is right; below 1."""
    return 1.0 / (1.0 + math.exp(-beta * (share - gamma)))


def sums(answer: str, reference: Mapping[str, Any]) -> int:
    """Characters of a worked sum before its first wrong step; all of them where none is.

    A step `a+b=c` is right where a is what the steps before came to, b is the next term of the
    question with its sign, and c is their sum.

    Raises:
        ValueError: the question has no sum.
    """
    total, *rest = _terms(reference)
    place = 0
    for number, step in enumerate(answer.split(";")):
        found = _STEP.fullmatch(step)
        if found is None or number >= len(rest):
            return place
        before, sign, term, result = found.groups()
        signed = int(sign + term)
        if (int(before), signed, int(result)) != (total, rest[number], total + signed):
            return place
        total, place = int(result), min(place + len(step) + 1, len(answer))
    return place


def _terms(reference: Mapping[str, Any]) -> list[int]:
    """The terms of the sum in the question, each with its sign."""
    found = _ASKED.search(str(reference.get("prompt")))
    if found is None:
        raise ValueError(f"the question has no sum: {str(reference.get('prompt'))[:80]!r}")
    text = found[0]
    first = re.match(r"-?\d+", text)
    assert first is not None, "the expression begins with a number"
    return [int(first[0]), *(int(s + n) for s, n in _TERM.findall(text[first.end() :]))]


def _judged(judge: Judge, answer: str, reference: Mapping[str, Any], separator: str) -> int:
    """Characters before the step that a judge names."""
    steps = answer.split(separator)
    shown = "\n".join(f"{number}. {step}" for number, step in enumerate(steps, 1))
    number = number_of(
        judge,
        answer,
        reference,
        f"The answer is wrong. Its steps are:\n{shown}\nWhich is the first wrong one? End with a "
        "line SCORE: and its number, or 0 where no step is wrong.",
    )
    if not 0 <= number <= len(steps):
        raise VerifierError(f"the judge named step {number} of {len(steps)}")
    if number == 0:
        return len(answer)
    return sum(len(step) + len(separator) for step in steps[: number - 1])


def _finder(first_wrong: str | None) -> Callable[[str, Mapping[str, Any]], object]:
    if first_wrong == SUMS:
        return sums
    found: Callable[[str, Mapping[str, Any]], object]
    found = import_named("right_prefix: first_wrong", first_wrong or "", (SUMS,))
    return found


def _check_numbers(
    beta: float = 5.0,
    gamma: float = 0.5,
    first_wrong: str | None = None,
    judge: Mapping[str, Any] | None = None,
    separator: str = "\n",
    **_: Any,
) -> None:
    """Raise `UserError` for what is wrong without a look at any code of the user's."""
    if not (isinstance(beta, (int, float)) and 0 < beta < 100):
        raise UserError(f"right_prefix: beta={beta} must be above 0 and below 100: 5 is usual")
    if not (isinstance(gamma, (int, float)) and 0 <= gamma <= 1):
        raise UserError(f"right_prefix: gamma={gamma} is a share of the answer: between 0 and 1")
    if beta * (1 - gamma) > _STEEPEST:
        raise UserError(
            f"right_prefix: with beta={beta} and gamma={gamma} a wrong answer would be worth what "
            "a right one is, in float32: lower beta"
        )
    if (first_wrong is None) == (judge is None):
        raise UserError(
            "right_prefix: who finds the first wrong step? Give it args, either judge: "
            "{base_url: ..., model: ...} or first_wrong: package.module:name (or sums)"
        )
    if not separator:
        raise UserError("right_prefix: separator is empty: give what stands between steps")
    if judge is not None:
        judge_of("right_prefix", judge)


def _usual(reference: Mapping[str, Any]) -> Mapping[str, Any]:
    """The rule for a row: a task's own, or mathematics."""
    return _USUAL["task" if reference.get("task") else "answer"]


def _rule(right: Mapping[str, Any]) -> Any:
    """A resolved rule. Raises `UserError` for one that cannot be used."""
    if unknown := sorted(set(right) - {"name", "args"}):
        raise UserError(f"right_prefix: right has {', '.join(unknown)}: it takes name and args")
    return _resolved(str(right.get("name")), json.dumps(right.get("args") or {}))


@lru_cache
def _resolved(name: str, args: str) -> Any:
    from actors.verifiers.registry import resolve  # which imports this module

    return resolve("right", name, json.loads(args))
