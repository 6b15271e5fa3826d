"""Tools: what the policy is told of them, and what becomes of its calls."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from environment_hosts import Played, playing

from actors.environments.base import Reply, ToolCall
from actors.environments.host import EnvironmentFailure, Observation


@pytest.fixture(scope="module")
def shop() -> Iterator[Played]:
    with playing("tool_environments:Shop") as played:
        yield played


def calling(*calls: tuple[str, dict[str, Any]]) -> Reply:
    return Reply("let me see", [ToolCall(name, arguments) for name, arguments in calls])


def told(answer: object) -> list[tuple[str, bool]]:
    assert isinstance(answer, Observation), answer
    assert answer.text == "\n".join(result.text for result in answer.results)
    return [(result.text, result.failed) for result in answer.results]


def test_the_policy_is_told_of_public_methods_alone(shop: Played) -> None:
    tools = {tool["function"]["name"]: tool["function"] for tool in shop.host.tools}
    assert set(tools) == {"price", "buy", "wait", "break_down"}
    assert tools["price"]["description"] == "Say what a thing costs."
    assert tools["price"]["parameters"] == {
        "type": "object",
        "properties": {
            "thing": {"type": "string", "description": "Its name."},
            "count": {"type": "integer", "description": "How many."},
        },
        "required": ["thing"],
    }


@pytest.mark.parametrize(
    ("name", "arguments", "text"),
    [
        ("price", {"thing": "tea"}, "3"),
        ("price", {"thing": "tea", "count": 4}, "12"),
        ("wait", {}, '{"waited": 0.01}'),
        ("buy", {"things": ["tea", "cake"]}, "bought tea, cake"),
    ],
)
def test_a_call_is_made(shop: Played, name: str, arguments: dict[str, Any], text: str) -> None:
    key, _ = shop.begin({"wanted": "tea"})
    assert told(shop.step(key, calling((name, arguments)))) == [(text, False)]
    shop.close(key)


@pytest.mark.parametrize(
    ("name", "arguments", "text"),
    [
        ("steal", {}, "there is no tool 'steal'; there are: break_down, buy, price, wait"),
        ("_secret", {}, "there is no tool '_secret'"),
        ("reward", {"reply": "tea"}, "there is no tool 'reward'"),
        ("price", {}, "price: 'thing' is a required property"),
        ("price", {"thing": 7}, "price: 7 is not of type 'string'"),
        ("price", {"thing": "tea", "count": "4"}, "price: '4' is not of type 'integer'"),
        ("price", {"thing": "tea", "colour": "red"}, "price takes no colour"),
        ("price", {"thing": "gold"}, "KeyError: 'gold'"),
        ("buy", {"things": "tea"}, "'tea' is not of type 'array'"),
    ],
)
def test_a_call_that_makes_no_sense_is_answered_and_the_episode_goes_on(
    shop: Played, name: str, arguments: dict[str, Any], text: str
) -> None:
    key, _ = shop.begin({"wanted": "tea"})
    ((found, failed),) = told(shop.step(key, calling((name, arguments))))
    assert found.startswith("error: ")
    assert (text in found, failed) == (True, True)
    assert told(shop.step(key, calling(("price", {"thing": "tea"})))) == [("3", False)]
    shop.close(key)


def test_a_call_that_could_not_be_read_is_answered(shop: Played) -> None:
    key, _ = shop.begin({"wanted": "tea"})
    reply = Reply("<tool_call>{", [ToolCall("price", {}, "it is no JSON")])
    assert told(shop.step(key, reply)) == [("error: it is no JSON", True)]
    shop.close(key)


def test_what_is_no_fault_of_the_call_ends_the_episode_without_a_reward(shop: Played) -> None:
    key, _ = shop.begin({"wanted": "tea"})
    answer = shop.step(key, calling(("break_down", {})))
    assert isinstance(answer, EnvironmentFailure)
    assert "ConnectionError: the till is offline" in answer.reason


def test_calls_of_one_reply_are_made_in_order_and_not_without_end(shop: Played) -> None:
    key, _ = shop.begin({"wanted": "tea"})
    calls = [("price", {"thing": "tea", "count": n + 1}) for n in range(10)]
    found = told(shop.step(key, calling(*calls)))
    assert found[:8] == [(str(3 * (n + 1)), False) for n in range(8)]
    assert [failed for _, failed in found[8:]] == [True, True]
    shop.close(key)


@pytest.mark.parametrize(("reply", "reward"), [("tea", 1.0), ("cake", 0.0)])
def test_a_reply_without_a_call_ends_the_episode_with_its_reward(
    shop: Played, reply: str, reward: float
) -> None:
    key, first = shop.begin({"wanted": "tea"})
    assert first == Observation("Welcome.", seconds=first.seconds)
    answer = shop.step(key, reply)
    assert isinstance(answer, Observation)
    assert (answer.done, answer.reward, answer.text) == (True, reward, "")
    shop.close(key)


def test_a_limit_asks_for_the_reward_too(shop: Played) -> None:
    key, _ = shop.begin({"wanted": "tea"})
    shop.step(key, calling(("price", {"thing": "tea"})))
    answer = shop.reward(key, "tea")
    assert isinstance(answer, Observation)
    assert answer.reward == 1.0
    shop.close(key)


@pytest.mark.parametrize("name", ["Counter", "made_counter"])
def test_an_object_in_the_style_of_a_factory(name: str) -> None:
    """`reset(**row)`, public methods, `get_reward`."""
    with playing(f"tool_environments:{name}", {"first": 5}) as counter:
        assert [tool["function"]["name"] for tool in counter.host.tools] == ["call", "step"]
        key, first = counter.begin({"prompt": "count", "up_to": 8})
        assert first == Observation("Count up to 8.", seconds=first.seconds)
        assert told(counter.step(key, calling(("step", {"by": 2})))) == [("7", False)]
        assert told(counter.step(key, calling(("step", {"by": 1}), ("call", {})))) == [
            ("8", False),
            ("yes?", False),
        ]
        end = counter.step(key, "done")
        assert isinstance(end, Observation)
        assert (end.done, end.reward) == (True, 1.0)
