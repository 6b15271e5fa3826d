"""A rubric: criteria with weights, each of which holds of an answer or does not.

    reward = sum of the weights of those that hold / sum of the weights above 0
    reward = 1 where there are factual criteria and all of them hold             (RGR-GRPO)

Criteria stand in `criteria`, in `column` of the question's row, or in both. Each is settled by its
`pattern`, by its `check`, else by the language model of `judge`. So a rubric needs no model where
rules can tell. A weight below 0 is of what a good answer does not do (HealthBench).

What is not as it should be is the feedback, a line each. The policy is shown these lines by
`algorithm.rollout.follow_up.kind=critique`, and criteria beforehand by
`algorithm.rollout.scaffold`.

Sources: arXiv 2511.12344 (RGR-GRPO), 2508.16949 (RuscaRL).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from actors.sandbox.blame import blame_completion
from actors.verifiers.base import ReferenceCheck, Verdict
from actors.verifiers.llm_judge import judge_of, true_of
from actors.verifiers.thoughts import answer_part
from common.config.names import import_named
from common.errors import UserError

_SLOT = re.compile(r"\{([A-Za-z_]\w*)\}")
_NAMES = {"criterion": "text", "points": "weight"}
"""Names of columns in HealthBench, and what they are here."""


@dataclass(frozen=True)
class Criterion:
    """A statement that is true of an answer or not."""

    text: str
    """It may have `{column}`, as `{answer}`, for what the row has there; so may `pattern`."""
    weight: float = 1.0
    factual: bool = False
    """Whether an answer of which all such criteria hold has the reward 1."""
    pattern: str | None = None
    """Regular expression that is found in an answer where the criterion holds."""
    check: str | None = None
    """Function `(text, reference) -> bool` that says so, as `package.module:name`."""

    def __post_init__(self) -> None:
        if not isinstance(self.text, str) or not self.text.strip():
            raise ValueError(f"a criterion has the text {self.text!r}: say what has to hold")
        if type(self.weight) not in (int, float):
            raise ValueError(f"criterion {self.text!r} has the weight {self.weight!r}, no number")
        if self.weight == 0 or (self.factual and self.weight < 0):
            raise ValueError(
                f"criterion {self.text!r} has the weight {self.weight:g}: give it one above 0, or "
                "below for what a good answer does not do; a factual one has one above"
            )
        if self.pattern is not None and self.check is not None:
            raise ValueError(f"criterion {self.text!r} has a pattern and a check: give it one")

    @property
    def line(self) -> str:
        """What a policy is told of it."""
        return f"- {self.text}" if self.weight > 0 else f"- Not this: {self.text}"

    def is_met(self, holds: bool) -> bool:
        """Whether an answer is as it should be."""
        return holds == (self.weight > 0)


def criteria_of(
    reference: Mapping[str, Any],
    criteria: Sequence[Any] = (),
    column: str | None = None,
    **_: Any,
) -> list[Criterion]:
    """The criteria of a question: those of the rule's arguments, then those of its row.

    Raises:
        ValueError: a criterion is none, or none has a weight above 0.
    """
    found = [_filled(_criterion(each), reference) for each in [*criteria, *_row(reference, column)]]
    if not any(each.weight > 0 for each in found):
        raise ValueError("the question has no criterion with a weight above 0")
    return found


def check_args(
    criteria: Sequence[Any] = (),
    column: str | None = None,
    judge: Mapping[str, Any] | None = None,
) -> None:
    """Raise `UserError` where there are no criteria, or one that nobody can settle."""
    if isinstance(criteria, str) or not (criteria or column):
        raise UserError(
            "rubric has no criteria: give it args, such as criteria: [{text: It says why., "
            "pattern: because}], or column: NAME for those of the row"
        )
    try:
        own = [_criterion(each) for each in criteria]
        for each in own:
            re.compile(each.pattern or "")
    except (ValueError, re.error) as error:
        raise UserError(f"rubric: {error}") from error
    if judge is not None:
        judge_of("rubric", judge)
    for each in own:
        if each.check is not None:
            import_named("rubric: check", each.check, ())
        elif each.pattern is None and judge is None:
            raise UserError(
                f"rubric: nobody can say whether {each.text!r} holds: give it a pattern or a "
                "check, or the rule a judge: {base_url: ..., model: ...}"
            )


def reference_check(**args: Any) -> ReferenceCheck:
    """What raises `ValueError` for a row without criteria, or with one that nobody can settle."""

    def check(reference: dict[str, Any]) -> None:
        for each in criteria_of(reference, **args):
            if each.pattern is None and each.check is None and args.get("judge") is None:
                raise ValueError(f"nobody can say whether {each.text!r} holds: it has no pattern")

    return check


def score(
    text: str,
    reference: dict[str, Any],
    criteria: Sequence[Any] = (),
    column: str | None = None,
    judge: Mapping[str, Any] | None = None,
    prompt: str = "",
) -> Verdict:
    """The weight of the criteria that hold of the answer in `text`, at most 1.

    Raises:
        ValueError: the question has no criteria, or a check says neither yes nor no.
        VerifierError: the judge gave no judgement.
    """
    asked, answer = criteria_of(reference, criteria, column), answer_part(text, prompt)
    holds = _settled(asked, answer, text, reference, judge)
    total = sum(each.weight for each in asked if each.weight > 0)
    reward = sum(each.weight for each in asked if holds[each]) / total
    factual = [holds[each] for each in asked if each.factual]
    failed = [each.line for each in asked if not each.is_met(holds[each])]
    reason = f"{len(asked) - len(failed)} of {len(asked)} criteria met"
    return Verdict.scored(
        1.0 if factual and all(factual) else reward, reason, feedback="\n".join(failed)
    )


def _settled(
    asked: Sequence[Criterion],
    answer: str,
    text: str,
    reference: dict[str, Any],
    judge: Mapping[str, Any] | None,
) -> dict[Criterion, bool]:
    """Whether each criterion holds. Of patterns alone the completion can be to blame."""
    holds: dict[Criterion, bool] = {}
    if told := [each for each in asked if each.pattern is None and each.check is None]:
        if judge is None:
            raise ValueError(f"nobody can say whether {told[0].text!r} holds: there is no judge")
        said, _ = true_of(judge_of("rubric", judge), answer, reference, [e.text for e in told])
        holds.update(zip(told, said, strict=True))
    for each in asked:
        if each.check is not None:
            check: Callable[[str, dict[str, Any]], object]
            check = import_named("rubric: check", each.check, ())
            found = check(text, reference)
            if not isinstance(found, bool):
                raise ValueError(f"{each.check} returned {found!r}, neither True nor False")
            holds[each] = found
    blame_completion()
    for each in asked:
        if each.pattern is not None:
            holds[each] = re.search(each.pattern, answer, re.DOTALL) is not None
    return holds


def _row(reference: Mapping[str, Any], column: str | None) -> Sequence[Any]:
    """The criteria in a column, which may be JSON."""
    if column is None:
        return ()
    found = reference.get(column)
    if isinstance(found, str):
        try:
            found = json.loads(found)
        except ValueError:
            found = [line for line in found.splitlines() if line.strip()]
    if not isinstance(found, list) or not found:
        raise ValueError(
            f"the row has no list of criteria in column {column!r} but {found!r:.80}; it has "
            f"{', '.join(sorted(reference)) or 'no column'}"
        )
    return [_known(each) for each in found]


def _known(each: Any) -> Any:
    """What is known here of a row's criterion, which may say more."""
    if not isinstance(each, Mapping):
        return each
    names = {*Criterion.__dataclass_fields__, *_NAMES}
    return {name: value for name, value in each.items() if name in names}


def _criterion(each: Any) -> Criterion:
    if not isinstance(each, Mapping):
        return Criterion(each)
    renamed = {_NAMES.get(str(name), str(name)): value for name, value in each.items()}
    try:
        return Criterion(**renamed)
    except TypeError as error:
        raise ValueError(f"{dict(each)} is no criterion: {error}") from error


def _filled(each: Criterion, reference: Mapping[str, Any]) -> Criterion:
    """A criterion with what the row has in its places."""

    def fill(text: str, made: Callable[[str], str]) -> str:
        def value(found: re.Match[str]) -> str:
            known = reference.get(found[1])
            return made(str(known)) if isinstance(known, (str, int, float)) else found[0]

        return _SLOT.sub(value, text)

    if each.pattern is None:
        return replace(each, text=fill(each.text, str))
    pattern = fill(each.pattern, re.escape)
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is not a regular expression: {error}") from error
    return replace(each, text=fill(each.text, str), pattern=pattern)
