"""The rule that rewards with a number of the row, for values made beforehand."""

from __future__ import annotations

import math

import pytest

from actors.sandbox.blame import next_task
from actors.verifiers.registry import resolve
from common.errors import UserError


@pytest.mark.parametrize(("value", "reward"), [(0.25, 0.25), (3, 3.0), (-1.5, -1.5)])
def test_the_number_of_the_row_whatever_is_said(value: float, reward: float) -> None:
    rule = resolve("column", "column", {"name": "v"})
    for text in ("", "<think> open", "42"):
        verdict = rule.judge(text, {"answer": "42", "v": value})
        assert verdict.reward == reward


@pytest.mark.parametrize("value", [None, "0.5", True, math.nan, math.inf])
def test_what_is_no_number_is_an_error_and_no_reward(value: object) -> None:
    next_task()
    verdict = resolve("column", "column", {"name": "v"}).judge("42", {"answer": "42", "v": value})
    assert verdict.kind == "error"
    assert verdict.reward is None


def test_a_column_that_is_missing_is_named_beside_those_there() -> None:
    verdict = resolve("column", "column", {"name": "value"}).judge("42", {"answer": "42", "v": 1})
    assert "'value'" in verdict.reason and "answer, v" in verdict.reason


@pytest.mark.parametrize("args", [{}, {"name": ""}, {"nam": "v"}])
def test_a_column_without_a_name_is_refused(args: dict[str, str]) -> None:
    with pytest.raises(UserError, match="column"):
        resolve("column", "column", args)
