"""What is said of an environment before a run."""

from __future__ import annotations

import asyncio

import pytest

from actors.environments.check import Inspected, environment_tools, inspect_environment
from common.config.environment import EnvironmentConfig
from common.errors import UserError


def config(name: str, **args: object) -> EnvironmentConfig:
    return EnvironmentConfig(name=name, args=dict(args), step_timeout_s=2.0)


def test_tools_are_found_and_nothing_is_said_of_an_environment_that_repeats_itself() -> None:
    found = inspect_environment(config("tool_environments:Shop"), {"wanted": "tea"})
    assert sorted(tool["function"]["name"] for tool in found.tools) == [
        "break_down",
        "buy",
        "price",
        "wait",
    ]
    assert found.notes == []


def test_tools_are_found_inside_of_a_loop_too() -> None:
    async def found() -> list[str]:
        tools = environment_tools(config("tool_environments:Counter"))
        return [tool["function"]["name"] for tool in tools]

    assert asyncio.run(found()) == ["call", "step"]
    assert environment_tools(EnvironmentConfig()) == []
    assert inspect_environment(EnvironmentConfig(), {}) == Inspected([], [])


@pytest.mark.parametrize("name", ["guess", "hostile_environments:Diced"])
def test_luck_that_follows_from_the_seed_is_none(name: str) -> None:
    assert inspect_environment(config(name), {}).notes == []


@pytest.mark.parametrize(
    ("args", "place"), [({"unseeded": True}, "at their beginning"), ({"late": 2}, "after turn 2")]
)
def test_an_environment_with_luck_of_its_own_is_told(args: dict[str, object], place: str) -> None:
    (note,) = inspect_environment(config("hostile_environments:Diced", **args), {}).notes
    assert place in note


@pytest.mark.parametrize(
    ("task", "reason"),
    [
        ({"do": "raise", "at": "reset"}, "reset: KeyError: 'shelf'.*in _raise"),
        ({"do": "sleep", "at": "reset"}, "no answer within 2 s"),
    ],
)
def test_an_episode_that_cannot_begin_is_refused(task: dict[str, str], reason: str) -> None:
    with pytest.raises(UserError, match=f"(?s)cannot begin an episode.*{reason}"):
        inspect_environment(config("hostile_environments:Hostile"), task)


@pytest.mark.parametrize("action", ["raise", "exit 7"])
def test_a_reply_that_makes_no_sense_may_fail(action: str) -> None:
    assert inspect_environment(config("hostile_environments:Hostile"), {"do": action}).notes == []
