"""What the rules of a run ask of an answer, in words: for prompts, not for verdicts."""

from __future__ import annotations

from collections.abc import Sequence

from actors.data.schemas import Row
from actors.verifiers.rubric import Criterion, criteria_of
from common.config.sections import VerifierSpec
from common.errors import UserError

_HOW = (
    "verifier.rules='[{name: rubric, args: {criteria: [{text: It says why., pattern: because}]}}]'"
)


def of_source(rules: Sequence[VerifierSpec], source: str) -> list[VerifierSpec]:
    """The rules that judge a data set."""
    return [rule for rule in rules if rule.judges(source)]


def rubric_of(rules: Sequence[VerifierSpec], row: Row) -> list[str]:
    """The criteria of the question of a row, a line each, by the rules that judge it.

    Raises:
        UserError: the row has no criteria where a rule looks for them.
    """
    lines: list[str] = []
    for rule in rules:
        if rule.name == "llm_judge":
            lines += [Criterion(text).line for text in rule.args.get("criteria") or ()]
        if rule.name == "rubric":
            try:
                lines += [each.line for each in criteria_of(row.record, **rule.args)]
            except ValueError as error:
                raise UserError(f"{row.place}: rule rubric: {error}") from error
    return lines


def check_rubrics(key: str, rules: Sequence[VerifierSpec], sources: Sequence[str]) -> None:
    """Raise `UserError` where the rules of a data set have no criteria for `key` to show."""
    for source in sources:
        if not any(map(_has_criteria, of_source(rules, source))):
            raise UserError(f"{key} shows criteria of verifier.rules{_which(source)}: {_HOW}")


def check_feedback(key: str, rules: Sequence[VerifierSpec], sources: Sequence[str]) -> None:
    """Raise `UserError` where no rule of a data set can say what an answer lacks, for `key`."""
    for source in sources:
        own = of_source(rules, source)
        if not any(":" in rule.name or _has_criteria(rule) for rule in own):
            raise UserError(
                f"{key} shows what rules say that an answer lacks, and none of verifier.rules"
                f"{_which(source)} does: {_HOW}, or a rule of your own that gives a Verdict with "
                "feedback"
            )


def _has_criteria(rule: VerifierSpec) -> bool:
    return rule.name == "rubric" or (rule.name == "llm_judge" and bool(rule.args.get("criteria")))


def _which(source: str) -> str:
    return f" for the source {source!r}" if source else ""
