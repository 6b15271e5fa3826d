"""A grader's time grows with the length of the completion and not faster.

A policy that collapses writes the longest text it may, and each grader sees it first. The texts
below are a megabyte of what a grader has to look at: without the bounds, one of them takes hours.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

from actors.verifiers import (
    choice,
    equality,
    format_rules,
    math_answer,
    program,
    reasoning_gym,
    right_prefix,
    rubric,
)
from actors.verifiers.base import Verdict
from actors.verifiers.registry import BUILTIN, voter

MEGABYTE = 1_000_000
LIMIT_S = 4.0
"""Of processor time, where a linear grader takes a tenth of it."""

UNITS = [
    "the cat sat on the mat ",
    "the answer is A ",
    "a",
    "7",
    "1,111",
    "1/2 ",
    " ",
    "\n",
    "$x$ ",
    "{",
    "\\boxed{",
    "\\boxed{1} and ",
    "\\text{7",
    "1\\,",
    "<answer>",
    "</think>",
    "```\n(\n```\n",
    "> > ```\n",
]
TEXTS = [("", unit) for unit in UNITS] + [
    ("the answer is ", " "),
    ("the answer is ", "is "),
    ("\\boxed{", "}"),
    ("\\boxed{", "7 "),
    ("\\text{", "7"),
    ("```\n", "x = (\n"),
    ("    ```python\n", " "),
    (" " * (MEGABYTE // 2) + "```\n", " "),
    ("<answer>", "7"),
]

GRADERS: dict[str, Callable[[str], Verdict]] = {
    "math_answer": lambda text: math_answer.score(text, {"answer": "1234567"}),
    "math_answer words": lambda text: math_answer.score(text, {"answer": "north"}),
    "math_answer last_number": lambda text: math_answer.score(
        text, {"answer": "1234567"}, extract="last_number"
    ),
    "math_answer boxed": lambda text: math_answer.score(text, {"answer": "8"}, extract="boxed"),
    "math_answer answer_tag": lambda text: math_answer.score(
        text, {"answer": "8"}, extract="answer_tag"
    ),
    "choice": lambda text: choice.score(text, {"answer": "B"}),
    "format_rules": lambda text: format_rules.score(text, {}, tags=["think", "answer", "x"]),
    "reasoning_gym": lambda text: reasoning_gym.score(text, GYM),
    "reasoning_gym last_line": lambda text: reasoning_gym.score(text, GYM, extract="last_line"),
    "rubric": lambda text: rubric.score(
        text, {"answer": "(3"}, [{"text": "It is {answer}.", "pattern": r"is\s+{answer}"}]
    ),
    # A wrong answer is worth something there: only a right one passes here.
    "right_prefix": lambda text: Verdict.scored(
        float(right_prefix.score(text, GYM, first_wrong="sums").reward == 1.0)
    ),
    "code_tests": lambda text: Verdict.scored(float(program.find_program(text, False) == "x")),
}
GYM: dict[str, Any] = {
    "task": "chain_sum",
    "answer": "3",
    "prompt": "1 + 2",
    "entry": {"question": "1 + 2", "answer": "3", "metadata": {}},
}


def test_every_grader_that_is_built_in_is_here() -> None:
    # One asks a model, the other reads no text.
    assert {name.split()[0] for name in GRADERS} == set(BUILTIN) - {"llm_judge", "column"}


@pytest.mark.parametrize("name", GRADERS)
def test_a_megabyte_is_a_wrong_answer_at_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(equality, "SECONDS", 1)  # what is left to read is math-verify's
    GRADERS[name]("warm up")
    for head, unit in TEXTS:
        text = head + unit * (MEGABYTE // len(unit)) + " x"
        begun = time.process_time()
        assert GRADERS[name](text).kind == "fail", (head[:20], unit)
        assert time.process_time() - begun < LIMIT_S, (head[:20], unit)


@pytest.mark.parametrize("name", ["math_answer", "choice", "reasoning_gym"])
def test_a_vote_is_as_fast(name: str) -> None:
    vote = voter(name)
    assert vote is not None
    for unit in UNITS:
        begun = time.process_time()
        vote(unit * (MEGABYTE // len(unit)), {"answer": "3"})
        assert time.process_time() - begun < LIMIT_S, unit
