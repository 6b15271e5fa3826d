"""What a host passes on, and what it keeps from the policy."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time

import pytest
from environment_hosts import playing

from actors.environments.base import Reply
from actors.environments.calculator import Calculator
from actors.environments.calculator import tasks as products
from actors.environments.guess import tasks as secrets
from actors.environments.host import Answer, Observation
from actors.environments.resolve import BUILTIN
from actors.environments.wire import cut_middle
from common.config.environment import BUILTIN_ENVIRONMENTS


def seen(answer: object) -> tuple[str, float | None, bool]:
    assert isinstance(answer, Observation), answer
    return answer.text, answer.reward, answer.done


@pytest.mark.parametrize(
    ("call", "result"),
    [
        ("[calc: 34 * 56]", "result: 1904"),
        ("I need [calc:99-100].", "result: -1"),
        ("[calc: 7 + 8] and [calc: 1*1]", "result: 15"),
        ("[calc: 2 ** 9]", "error: write two whole numbers"),
        ("[calc: __import__('os')]", "error: write two whole numbers"),
        ("[calc: " + "9" * 30 + " * 9]", "error: write two whole numbers"),
    ],
)
def test_the_calculator_calculates(call: str, result: str) -> None:
    calculator = Calculator()
    calculator.reset({"answer": "1904"}, 0)
    step = calculator.step(call)
    assert step.observation.startswith(result)
    assert (step.reward, step.done) == (None, False)
    (called,) = step.results
    assert (called.text, called.failed) == (step.observation, result.startswith("error"))


@pytest.mark.parametrize(
    ("reply", "reward"),
    [
        ("1904", 1.0),
        ("34 * 56 is 1904.", 1.0),
        ("1904 is 34 * 56", 0.0),
        ("none", 0.0),
        ("-1904", 0.0),
        ("9" * 5000, 0.0),
    ],
)
def test_the_last_number_of_a_reply_without_a_call_is_the_answer(reply: str, reward: float) -> None:
    calculator = Calculator()
    calculator.reset({"answer": "1904"}, 0)
    step = calculator.step(reply)
    assert (step.reward, step.done) == (reward, True)


def test_tasks_of_the_built_in_environments_can_be_won() -> None:
    """By the calculator's own results, and by halving."""
    with playing("calculator") as played:
        for _, task in zip(range(3), products(seed=3), strict=False):
            question = task["prompt"][-1]["content"]
            key, _ = played.begin(task)
            result, _, _ = seen(played.step(key, f"[calc: {question[8:-1]}]"))
            assert seen(played.step(key, result.removeprefix("result: "))) == ("", 1.0, True)
            played.close(key)
    with playing("guess") as played:
        for _, task in zip(range(4), secrets(seed=3), strict=False):
            low, high, done = 1, 8, False
            key, _ = played.begin(task)
            for _ in range(4):
                middle = (low + high) // 2
                text, reward, done = seen(played.step(key, f"Is it {middle}?"))
                if done:
                    break
                low, high = (middle + 1, high) if "higher" in text else (low, middle - 1)
            assert (done, reward) == (True, 1.0)
            assert seen(played.reward(key, ""))[1] == 0.0
            played.close(key)


def test_what_a_wasted_guess_costs_is_given_back() -> None:
    """Turns differ in what they earn, and the episode is worth 1 or 0 as without."""
    with playing("guess", {"waste": 0.25}) as played:
        for last, worth in (("5", 1.0), ("6", 0.0)):
            key, _ = played.begin({"answer": "5"})
            rewards = [seen(played.step(key, guess))[1] for guess in ("3", "2", "what", last)]
            assert rewards[:3] == [None, -0.25, -0.25]
            if worth == 0.0:
                rewards.append(seen(played.reward(key, last))[1])
            assert sum(reward or 0.0 for reward in rewards) == worth
            played.close(key)


def test_guesses_that_know_the_same_are_in_one_state() -> None:
    with playing("guess") as played:
        states = []
        for guesses in (["6", "3"], ["3", "6"]):
            key, _ = played.begin({"answer": "4"})
            for guess in [*guesses, "no idea"]:
                answer = played.step(key, guess)
                assert isinstance(answer, Observation)
                states.append(answer.state)
            played.close(key)
    assert states == ["1..8", "1..5", "4..5", "1..8", "4..8", "4..5"]


def test_a_group_shares_its_seed_and_groups_do_not() -> None:
    """Python's random numbers are seeded, though all processes are forked from one."""
    with playing("hostile_environments:Diced") as diced:
        found = {}
        for seed in (1, 1, 2):
            key, first = diced.begin(seed=seed)
            rolls = (seen(first)[0], seen(diced.step(key))[0])
            assert found.setdefault(seed, rolls) == rolls
            diced.close(key)
    assert found[1][0] != found[1][1]
    assert found[1] != found[2]


def test_environments_of_many_episodes_work_at_the_same_time() -> None:
    """Twelve steps of 0.4 s each take far less than 4.8 s, in one worker."""
    with playing("hostile_environments:Slow", {"seconds": 0.4}) as slow:
        keys = [slow.begin()[0] for _ in range(12)]

        async def all_at_once() -> list[object]:
            return list(await asyncio.gather(*(slow.host.step(key, Reply("")) for key in keys)))

        begun = time.monotonic()
        answers = slow.wait(all_at_once())
        assert time.monotonic() - begun < 2.4
    assert {seen(answer) for answer in answers} == {("at last", None, False)}


def test_a_worker_that_is_busy_is_told_later_and_not_given_up() -> None:
    """Its socket is full while it stands still. What was to be said comes when it goes on."""
    with playing("guess") as played:
        (pid,) = played.host.pids
        (worker,) = played.host._workers
        key, _ = played.begin({"answer": "4"})

        async def while_it_stands_still() -> Answer:
            os.kill(pid, signal.SIGSTOP)
            try:
                for number in range(3000):
                    worker._tell({"kill": f"nobody-{number}"})
                begun = asyncio.ensure_future(played.host.reset("late", {"answer": "4"}, 0))
                await asyncio.sleep(0.2)
                assert worker._outbox
                assert not begun.done()
            finally:
                os.kill(pid, signal.SIGCONT)
            return await begun

        assert seen(played.wait(while_it_stands_still())) == ("", None, False)
        assert not worker._outbox
        assert not worker.lost
        for episode in (key, "late"):
            assert seen(played.step(episode, "4")) == ("", 1.0, True)


def test_more_episodes_than_a_worker_can_begin_at_once_all_begin() -> None:
    with playing("guess") as played:

        async def all_at_once() -> list[Answer]:
            keys = [f"episode-{number}" for number in range(100)]
            return await asyncio.gather(*(played.host.reset(key, {}, 0) for key in keys))

        assert {seen(answer) for answer in played.wait(all_at_once())} == {("", None, False)}
        assert played.host.open_episodes == 100


def test_a_text_is_cut_in_its_middle_and_says_so() -> None:
    text = "".join(chr(97 + n % 26) for n in range(1000))
    for limit in (1, 2, 7, 100, 999):
        cut = cut_middle(text, limit)
        head, gap, tail = cut.partition(f"\n[... {1000 - limit} characters left out ...]\n")
        assert gap
        assert len(head) + len(tail) == limit
        assert text.startswith(head)
        assert text.endswith(tail)
    assert cut_middle(text, 1000) == text


def test_the_built_in_names_are_those_of_the_configuration() -> None:
    assert tuple(BUILTIN) == BUILTIN_ENVIRONMENTS


def test_a_task_travels_whole() -> None:
    task = {"prompt": [{"role": "user", "content": "ü\u2028\0"}], "answer": None, "n": 1e-9}
    with playing("hostile_environments:Echo") as echo:
        key, first = echo.begin(task, seed=2**40)
        assert json.loads(seen(first)[0]) == [task, 2**40]
        echo.close(key)
