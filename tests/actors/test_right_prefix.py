"""SGPO: a wrong answer is worth more the later it goes wrong, and less than a right one."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from judging_endpoint import Endpoint, saying

from actors.sandbox.blame import completion_is_to_blame, next_task
from actors.verifiers.registry import reference_checks, resolve
from actors.verifiers.right_prefix import check_args, reference_check, score, sums, worth
from common.config.algorithm import AlgorithmConfig
from common.config.sections import VerifierSpec
from common.errors import UserError, VerifierError
from learner.algorithm.recipe import Recipe
from learner.algorithm.rewarded import Rewarded

SUM = {"prompt": "State the answer: 3 + 8 - 5 = ?", "answer": "6"}
RULE: dict[str, Any] = {
    "first_wrong": "sums",
    "right": {"name": "math_answer", "args": {"extract": "last_number"}},
}


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("3+8=11;11-5=6", "3+8=11;11-5=6"),
        (" 3+8=11;11-5=7", " 3+8=11;"),
        ("3+8=12;12-5=7", ""),
        ("3+8=11;12-5=7", "3+8=11;"),  # it does not go on from what it came to
        ("3+8=11;11+5=16", "3+8=11;"),  # it is not the question's sign
        ("3-5=-2;-2+8=6", ""),  # nor its order
        ("3+8=11;", "3+8=11;"),  # it ends too soon: no step is wrong
        ("3+8=11", "3+8=11"),
        ("3+8=11;11-5=6;6+1=7", "3+8=11;11-5=6;"),  # a step too many
        ("6", ""),
        ("", ""),
        ("3+8=11;" + "9" * 5000 + "-5=6", "3+8=11;"),
    ],
)
def test_steps_of_a_worked_sum_are_checked_exactly(answer: str, right: str) -> None:
    assert answer[: sums(answer, SUM)] == right


def test_a_question_may_begin_below_zero_and_needs_a_sum() -> None:
    assert sums("-3+8=5", {"prompt": "-3 + 8 = ?"}) == 6
    with pytest.raises(ValueError, match="has no sum"):
        sums("4", {"prompt": "What is two and two?"})


def test_the_reward_is_one_or_the_sigmoid_of_the_right_share() -> None:
    for answer, share in (("3+8=11;11-5=6", None), ("3+8=11;11-5=7", 7 / 13), ("7", 0.0)):
        verdict = score(answer, SUM, **RULE)
        wanted = 1.0 if share is None else 1 / (1 + math.exp(-5 * (share - 0.5)))
        assert verdict.reward == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize(("beta", "gamma"), [(5.0, 0.5), (13.0, 0.0), (26.0, 0.5), (0.1, 1.0)])
def test_it_rises_with_the_share_and_a_right_answer_beats_every_wrong_one(
    beta: float, gamma: float
) -> None:
    """In float32 too, in which rewards travel."""
    check_args(beta, gamma, "sums")
    found = [np.float32(worth(share, beta, gamma)) for share in np.linspace(0, 1, 33)]
    assert all(before < after for before, after in pairwise(found))
    assert found[-1] < np.float32(1.0)


def test_a_group_of_wrong_answers_that_go_wrong_at_different_places_has_a_signal() -> None:
    answers = ["3+8=12;12-5=7", "3+8=11;11-5=7", "7", "3+8=11;11-5=5"]
    rewards = torch.tensor([score(a, SUM, **RULE).reward for a in answers], dtype=torch.float64)
    lengths = torch.ones(4, dtype=torch.long)
    group = torch.zeros(4, dtype=torch.long)
    given = Rewarded(rewards, group, lengths, "v", lengths, None)
    advantages = Recipe(AlgorithmConfig(), "none", 20).prepare(given).advantages_B
    assert (advantages > 0).tolist() == [False, True, False, True]
    assert bool((advantages != 0).all())


def test_a_rule_that_could_not_judge_is_no_wrong_answer() -> None:
    next_task()
    verdict = score("3+8=11", {"prompt": "3 + 8 = ?", "answer": None}, **RULE)
    assert (verdict.kind, verdict.reward) == ("error", None)
    assert not completion_is_to_blame()


def test_what_the_rule_inside_blames_is_not_the_judges_fault(endpoint: Endpoint) -> None:
    judge = {"base_url": endpoint.url, "model": "m", "retries": 0}
    endpoint.replies = [saying("no idea")]
    rule = resolve("sgpo", "right_prefix", {"judge": judge, "right": RULE["right"]})
    next_task()
    verdict = rule.judge("a\nb 7", SUM)
    assert (verdict.kind, verdict.reward) == ("error", None)
    assert "no whole number" in verdict.reason


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    endpoint = Endpoint()
    yield endpoint
    endpoint.close()


@pytest.mark.parametrize(
    ("said", "share"), [("SCORE: 1", 0.0), ("The second.\nSCORE: 2", 6 / 10), ("SCORE: 0", 1.0)]
)
def test_a_judge_names_the_first_wrong_step(endpoint: Endpoint, said: str, share: float) -> None:
    endpoint.replies = [saying(said)]
    judge = {"base_url": endpoint.url, "model": "m"}
    verdict = score("3 + 8\nis 7", SUM, judge=judge, right=RULE["right"])
    assert verdict.reward == pytest.approx(worth(share, 5.0, 0.5))
    assert "1. 3 + 8\n2. is 7" in endpoint.asked[0]["messages"][0]["content"]


@pytest.mark.parametrize("said", ["SCORE: 3", "SCORE: -1", "SCORE: 1.5", "the first"])
def test_a_judge_that_names_no_step_gives_no_reward(endpoint: Endpoint, said: str) -> None:
    endpoint.replies = [saying(said)]
    judge = {"base_url": endpoint.url, "model": "m"}
    with pytest.raises(VerifierError):
        score("3 + 8\nis 7", SUM, judge=judge, right=RULE["right"])


def test_a_judge_is_not_asked_about_right_answers(endpoint: Endpoint) -> None:
    judge = {"base_url": endpoint.url, "model": "m"}
    assert score("6", SUM, judge=judge, right=RULE["right"]).reward == 1.0
    assert endpoint.asked == []


def test_a_function_of_the_users_own_finds_the_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_steps.py").write_text(
        "def half(text, reference):\n    return len(text) // 2\n"
        "def beyond(text, reference):\n    return len(text) + 1\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    right = RULE["right"]
    verdict = score("ab 7", SUM, first_wrong="my_steps:half", right=right)
    assert verdict.reward == worth(0.5, 5.0, 0.5) == 0.5
    with pytest.raises(ValueError, match="no place in the answer"):
        score("ab 7", SUM, first_wrong="my_steps:beyond", right=right)


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        ({}, "who finds the first wrong step"),
        ({"first_wrong": "sums", "judge": {}}, "who finds the first wrong step"),
        ({"first_wrong": "some"}, "sums"),
        ({"first_wrong": "sums", "beta": 0}, "beta=0 must be above 0"),
        ({"first_wrong": "sums", "gamma": 2}, "gamma=2 is a share"),
        ({"first_wrong": "sums", "beta": 40}, "would be worth what"),
        ({"first_wrong": "sums", "separator": ""}, "separator is empty"),
        ({"first_wrong": "sums", "right": {"name": "no_rule"}}, "no_rule"),
        ({"first_wrong": "sums", "right": {"weight": 1}}, "right has weight"),
    ],
)
def test_arguments_that_cannot_work_are_refused(args: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        check_args(**args)


def test_a_row_is_checked_by_the_rule_inside_and_has_a_sum() -> None:
    (check,) = reference_checks([VerifierSpec(name="right_prefix", args=RULE)])
    check(SUM)
    for row in (SUM | {"answer": ""}, SUM | {"prompt": "two and two"}):
        with pytest.raises(ValueError, match=r"is empty|has no sum"):
            check(row)
    with pytest.raises(UserError, match="who finds the first wrong step"):
        reference_check()
