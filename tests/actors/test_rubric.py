"""Rubrics: what each criterion adds to the reward, what is said of it, and who settles it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from judging_endpoint import Endpoint, saying

from actors.sandbox.blame import completion_is_to_blame, next_task
from actors.sandbox.sandbox import RuleSpec, Sandbox, Task
from actors.verifiers.registry import JUDGE, reference_checks
from actors.verifiers.rubric import Criterion, check_args, criteria_of, reference_check, score
from common.config.load import load_config
from common.config.sections import VerifierSpec
from common.errors import UserError, VerifierError

REFERENCE = {"prompt": "What is 2 + 2?", "answer": 4}
RIGHT = {"text": "It is {answer}.", "pattern": r"\b{answer}\b", "weight": 3, "factual": True}
WHY = {"text": "It says why.", "pattern": "because"}
RUDE = {"text": "It is rude.", "pattern": "fool", "weight": -2}


@pytest.mark.parametrize(
    ("text", "criteria", "reward", "feedback"),
    [
        ("4, because", [RIGHT, WHY], 1.0, ""),
        # R = sum w s / sum w, and 1 where everything factual holds.
        ("5, because", [RIGHT, WHY], 0.25, "- It is 4."),
        ("4", [RIGHT, WHY], 1.0, "- It says why."),
        ("4", [RIGHT | {"factual": False}, WHY], 0.75, "- It says why."),
        ("5", [RIGHT, WHY], 0.0, "- It is 4.\n- It says why."),
        # Of two factual ones both have to hold.
        ("4", [RIGHT, WHY | {"factual": True}], 0.75, "- It says why."),
        # Below 0: the sum is over what a good answer does.
        ("4, fool", [RIGHT | {"factual": False}, RUDE], 1 / 3, "- Not this: It is rude."),
        ("5, fool", [RIGHT, RUDE], -2 / 3, "- It is 4.\n- Not this: It is rude."),
    ],
)
def test_weights_facts_and_what_is_lacking(
    text: str, criteria: list[dict[str, Any]], reward: float, feedback: str
) -> None:
    verdict = score(text, REFERENCE, criteria)
    assert verdict.reward == pytest.approx(reward)
    assert verdict.feedback == feedback


def test_thoughts_are_not_judged_and_an_open_one_is_no_answer() -> None:
    assert score("<think>because</think>4", REFERENCE, [WHY]).reward == 0.0
    assert score("because 4", REFERENCE, [WHY], prompt="Go. <think>").reward == 0.0


def test_what_a_row_has_is_text_in_a_pattern() -> None:
    odd = {"answer": "(x+1"}
    assert score("so (x+1", odd, [RIGHT | {"pattern": "{answer}"}]).reward == 1.0
    (found,) = criteria_of(odd, ["Not {unknown}, and {2}: {answer}"])
    assert found.text == "Not {unknown}, and {2}: (x+1"


@pytest.mark.parametrize(
    "column",
    [
        [{"criterion": "It says why.", "points": 5, "tags": ["a"], "pattern": "because"}],
        json.dumps([{"text": "It says why.", "weight": 5, "pattern": "because"}]),
    ],
)
def test_a_row_has_criteria_of_its_own(column: Any) -> None:
    reference = REFERENCE | {"rubric": column}
    assert criteria_of(reference, column="rubric") == [
        Criterion("It says why.", 5, pattern="because")
    ]
    verdict = score("4", reference, [RIGHT | {"factual": False}], column="rubric")
    assert (verdict.reward, verdict.feedback) == (3 / 8, "- It says why.")


def test_a_column_of_lines_is_a_criterion_a_line() -> None:
    found = criteria_of({"rubric": "It says why.\n\nIt is polite.\n"}, column="rubric")
    assert [each.text for each in found] == ["It says why.", "It is polite."]


@pytest.mark.parametrize(
    ("reference", "reason"),
    [
        ({}, "no list of criteria in column 'rubric'"),
        ({"rubric": []}, "no list of criteria"),
        ({"rubric": [{"points": 3}]}, "is no criterion"),
        ({"rubric": [{"text": "", "weight": 3}]}, "say what has to hold"),
        ({"rubric": [{"text": "a", "weight": 0, "pattern": "a"}]}, "give it one above 0"),
        ({"rubric": [{"text": "a", "weight": "5"}]}, "no number"),
        ({"rubric": [{"text": "a", "weight": -1, "pattern": "a"}]}, "no criterion with a weight"),
        ({"rubric": [{"text": "a", "pattern": "("}]}, "not a regular expression"),
        ({"rubric": ["a"]}, "nobody can say whether 'a' holds"),
    ],
)
def test_a_row_that_nobody_can_judge_by_is_refused_and_is_no_wrong_answer(
    reference: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        reference_check(column="rubric")(reference)
    (check,) = reference_checks([VerifierSpec(name="rubric", args={"column": "rubric"})])
    with pytest.raises(ValueError, match=reason):
        check(reference)
    next_task()
    with pytest.raises(ValueError, match=reason):
        score("4", reference, column="rubric")
    assert not completion_is_to_blame()


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        ({}, "has no criteria"),
        ({"criteria": "It says why."}, "has no criteria"),
        ({"criteria": ["It says why."]}, "nobody can say whether"),
        ({"criteria": [WHY | {"check": "a:b"}]}, "a pattern and a check"),
        ({"criteria": [WHY | {"pattern": "("}]}, "missing \\)"),
        ({"criteria": [WHY | {"wieght": 2}]}, "wieght"),
        ({"criteria": [RUDE | {"factual": True}]}, "a factual one has one above"),
        ({"criteria": [{"text": "a", "check": "no_such_module:f"}]}, "cannot be imported"),
        ({"criteria": [WHY], "judge": {"base_url": "localhost"}}, "judge takes what llm_judge"),
        ({"criteria": [WHY], "judge": {"base_url": "x", "model": "m"}}, "is no address"),
    ],
)
def test_arguments_that_cannot_work_are_refused(args: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        check_args(**args)


def test_a_check_of_the_users_own_settles_a_criterion(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_checks.py").write_text(
        "def right(text, reference):\n    return str(reference['answer']) in text\n"
        "def unsure(text, reference):\n    return None\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    criteria = [{"text": "It is right.", "check": "my_checks:right"}]
    check_args(criteria)
    assert [score(text, REFERENCE, criteria).reward for text in ("4", "5")] == [1.0, 0.0]
    with pytest.raises(ValueError, match="returned None, neither True nor False"):
        score("4", REFERENCE, [{"text": "It is right.", "check": "my_checks:unsure"}])


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    endpoint = Endpoint()
    yield endpoint
    endpoint.close()


def test_a_model_settles_what_no_rule_can(endpoint: Endpoint) -> None:
    """It is asked for those criteria alone, and what it does not say is no verdict."""
    judge = {"base_url": endpoint.url, "model": "judge", "retries": 0}
    criteria = [RIGHT, {"text": "It is polite."}, "It is short."]
    endpoint.replies = [saying("1: no\n2: yes")]
    verdict = score("5", REFERENCE, criteria, judge=judge)
    assert (verdict.reward, verdict.feedback) == (1 / 5, "- It is 4.\n- It is polite.")
    content = endpoint.asked[0]["messages"][0]["content"]
    assert "1. It is polite.\n2. It is short." in content
    assert "It is 4." not in content
    endpoint.replies = [saying("1: no")]
    next_task()
    with pytest.raises(VerifierError, match=r"said nothing of \[2\]"):
        score("six", REFERENCE, criteria, judge=judge)
    assert not completion_is_to_blame()


def test_what_is_lacking_comes_from_behind_the_walls() -> None:
    sandbox = Sandbox(JUDGE, [RuleSpec("rubric", "rubric", {"criteria": [RIGHT, WHY]})], 60.0)
    try:
        (verdict,) = sandbox.score([Task(0, "5", json.dumps(REFERENCE))])
    finally:
        sandbox.close()
    assert (verdict.kind, verdict.reward) == ("fail", 0.0)
    assert verdict.feedback == "- It is 4.\n- It says why."


def test_a_judge_of_a_rubric_needs_the_network() -> None:
    rule = "{name: rubric, args: {criteria: [a], judge: {base_url: 'http://h/v1', model: m}}}"
    with pytest.raises(UserError, match=r"rubric, which asks an endpoint"):
        load_config([], ["model.path=none", f"verifier.rules=[{rule}]"])
    load_config([], ["model.path=none", f"verifier.rules=[{rule}]", "verifier.network=true"])
