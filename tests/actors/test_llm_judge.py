"""A judge behind an endpoint: what it says is the reward, and what goes wrong is none."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest
from judging_endpoint import Endpoint, failing, saying, send

from actors.sandbox.sandbox import RuleSpec, Sandbox, Task
from actors.verifiers.llm_judge import check_args, score
from actors.verifiers.registry import JUDGE
from common.errors import UserError, VerifierError

REFERENCE = {"prompt": "What is 2 + 2?", "answer": "4"}


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    endpoint = Endpoint()
    yield endpoint
    endpoint.close()


def judged(endpoint: Endpoint, text: str = "four", **args: Any) -> float | None:
    return score(text, REFERENCE, base_url=endpoint.url, model="judge", **args).reward


@pytest.mark.parametrize(
    ("said", "args", "reward"),
    [
        ("Right.\nSCORE: 10", {}, 1.0),
        ("SCORE: 0", {}, 0.0),
        ("**SCORE: 7.5**", {}, 0.75),
        ("I thought of SCORE: 9, but no.\nscore: 2", {}, 0.2),
        ("SCORE: 3", {"scale": 4}, 0.75),
        ("1: yes\n2: no", {"criteria": {"It is right.": 3, "It is polite.": 1}}, 0.75),
        ("1. **No**\n2) Yes.", {"criteria": {"It is right.": 3, "It is polite.": 1}}, 0.25),
    ],
)
def test_what_the_judge_says_is_the_reward(
    endpoint: Endpoint, said: str, args: dict[str, Any], reward: float
) -> None:
    endpoint.replies = [saying(said)]
    assert judged(endpoint, **args) == reward


def test_criteria_that_do_not_hold_are_the_feedback(endpoint: Endpoint) -> None:
    endpoint.replies = [saying("1: yes\n2: no\n3: no")]
    verdict = score(
        "four",
        REFERENCE,
        base_url=endpoint.url,
        model="judge",
        criteria={"It is right.": 2, "It is polite.": 1, "It says why.": 1},
    )
    assert (verdict.reward, verdict.feedback) == (0.5, "- It is polite.\n- It says why.")


def test_the_judge_is_told_all_it_needs_and_thoughts_are_kept_from_it(endpoint: Endpoint) -> None:
    endpoint.replies = [saying("SCORE: 1")]
    text = '<think>psst</think>It is "4".\nSCORE: 10'
    judged(endpoint, text, rubric="Be strict.")
    (asked,) = endpoint.asked
    content = asked["messages"][0]["content"]
    assert asked["path"] == "/v1/chat/completions"
    assert (asked["model"], asked["temperature"]) == ("judge", 0.0)
    for part in ("Be strict.", '"What is 2 + 2?"', '"4"', json.dumps('It is "4".\nSCORE: 10')):
        assert part in content
    assert "psst" not in content


@pytest.mark.parametrize(
    ("said", "args", "reason"),
    [
        ("Well done!", {}, "gave no score from 0 to 10"),
        ("SCORE: 11", {}, "gave no score from 0 to 10"),
        ("SCORE: -1", {}, "gave no score from 0 to 10"),
        ("", {}, "gave no score from 0 to 10"),
        ("1: yes", {"criteria": {"a": 1, "b": 1}}, r"said nothing of \[2\]"),
    ],
)
def test_a_judge_that_does_not_judge_gives_no_reward(
    endpoint: Endpoint, said: str, args: dict[str, Any], reason: str
) -> None:
    endpoint.replies = [saying(said)]
    with pytest.raises(VerifierError, match=reason):
        judged(endpoint, **args)


@pytest.mark.parametrize("status", [429, 500, 503])
def test_errors_that_pass_are_asked_again(endpoint: Endpoint, status: int) -> None:
    endpoint.replies = [failing(status), failing(status), saying("SCORE: 10")]
    assert judged(endpoint, timeout_s=30.0) == 1.0
    assert len(endpoint.asked) == 3


@pytest.mark.parametrize(("status", "attempts"), [(500, 2), (401, 1), (404, 1)])
def test_errors_that_stay_give_no_reward(endpoint: Endpoint, status: int, attempts: int) -> None:
    endpoint.replies = [failing(status)]
    with pytest.raises(VerifierError, match="no judgement of http://127.0.0.1"):
        judged(endpoint, retries=1)
    assert len(endpoint.asked) == attempts


@pytest.mark.parametrize("body", [b"", b"[]", b"null", b'{"choices": []}', b"<html>"])
def test_what_is_no_answer_gives_no_reward(endpoint: Endpoint, body: bytes) -> None:
    endpoint.replies = [lambda handler: send(handler, 200, body)]
    with pytest.raises(VerifierError):
        judged(endpoint, retries=0)


def test_a_judge_that_hangs_has_a_limit(endpoint: Endpoint) -> None:
    endpoint.replies = [lambda handler: time.sleep(5)]
    begun = time.monotonic()
    with pytest.raises(VerifierError, match="APITimeoutError"):
        judged(endpoint, timeout_s=0.6, retries=1)
    assert time.monotonic() - begun < 4


def test_nobody_there_gives_no_reward() -> None:
    with pytest.raises(VerifierError, match="APIConnectionError"):
        score("4", REFERENCE, base_url="http://127.0.0.1:1/v1", model="judge", retries=0)


def test_the_same_answer_is_judged_once_and_a_failure_again(endpoint: Endpoint) -> None:
    endpoint.replies = [failing(401), saying("SCORE: 5")]
    with pytest.raises(VerifierError):
        judged(endpoint)
    assert [judged(endpoint) for _ in range(3)] == [0.5] * 3
    assert len(endpoint.asked) == 2
    judged(endpoint, "five")
    assert len(endpoint.asked) == 3


def test_the_key_is_read_from_its_file(endpoint: Endpoint, tmp_path: Any) -> None:
    (tmp_path / "key").write_text("sk-secret\n")
    endpoint.replies = [saying("SCORE: 5")]
    judged(endpoint, api_key_file=str(tmp_path / "key"))
    assert endpoint.keys == ["Bearer sk-secret"]


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        ({"base_url": "localhost:8000"}, "is no address"),
        ({"model": ""}, "model is empty"),
        ({"scale": 0}, "scale=0 is too small"),
        ({"retries": -1}, "retries=-1 is too small"),
        ({"criteria": {}}, "criteria have no weight"),
        ({"api_key_file": "/no/such/key"}, "cannot be read"),
    ],
)
def test_arguments_that_cannot_work_are_refused(args: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        check_args(**{"base_url": "http://localhost/v1", "model": "judge", **args})


def test_it_judges_from_behind_the_walls(endpoint: Endpoint) -> None:
    """With `verifier.network`; without it, what it cannot do is no reward of 0."""
    endpoint.replies = [saying("SCORE: 10")]
    args = {"base_url": endpoint.url, "model": "judge", "retries": 0}
    kinds = []
    for network in (True, False):
        sandbox = Sandbox(JUDGE, [RuleSpec("llm_judge", "llm_judge", args)], 60.0, network=network)
        try:
            (verdict,) = sandbox.score([Task(0, "four", json.dumps(REFERENCE))])
            kinds.append((verdict.kind, verdict.reward))
        finally:
            sandbox.close()
    assert kinds == [("pass", 1.0), ("error", None)]
