"""What a plan says of episodes: which turn is cut, and who waits for an environment."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.environments.base import Reply
from actors.environments.host import Observation
from actors.generation.engine import Completion
from actors.generation.episodes import Player
from actors.rendering.renderer import Reply as Read
from common.config.environment import EnvironmentConfig
from common.config.sections import Config
from common.trajectory import GroupRequest
from deploy.cli import main
from deploy.command.presets import CONFIGS, load
from deploy.predict.episodes import Shape, Trial, episode_lines

TRIAL = Trial(between_tokens=5, speaks_first=False, reset_s=1.0, turn_s=2.0, longest_prompt=20)
NUMBER = st.integers(1, 12)


class Longest:
    """A policy, an environment and a renderer that never stop before a limit makes them."""

    stop_token_ids = ()

    def __init__(self, shape: Shape) -> None:
        self.shape = shape

    async def sample(self, name: str, token_ids: list[int], sampling: dict[str, Any]) -> Completion:
        count = sampling["max_tokens"]
        return Completion([7] * count, [-0.5] * count, [0] * count, "length")

    async def reset(self, key: str, task: dict[str, Any], seed: int) -> Observation:
        return Observation("x" if self.shape.observations == self.shape.turns else "")

    async def step(self, key: str, reply: Reply) -> Observation:
        return Observation("x")

    async def reward(self, key: str, reply: str) -> Observation:
        return Observation(reward=0.0)

    def close(self, key: str) -> None: ...

    def behind(self, messages: list[dict[str, Any]], *, ended: bool) -> list[int]:
        return [9] * self.shape.observation_tokens

    def ended(self, token_ids: Sequence[int]) -> bool:
        return False

    def parse(self, token_ids: Sequence[int]) -> Read:
        return Read("", "", (), "")

    def __call__(self, text: str, *, add_special_tokens: bool) -> Any:
        raise AssertionError("no observation of one letter is shortened")

    decode = __call__


@settings(deadline=None, max_examples=300)
@given(NUMBER, NUMBER, NUMBER, st.integers(1, 200), st.booleans())
def test_the_turn_that_is_cut_is_the_one_that_a_player_cuts(
    turns: int, turn_tokens: int, observation_tokens: int, room: int, speaks_first: bool
) -> None:
    shape = Shape(turns, turn_tokens, turns - (not speaks_first), observation_tokens)
    environment = EnvironmentConfig(name="x", max_turns=turns, turn_tokens=turn_tokens)
    parts = Longest(shape)
    player = Player(environment, parts, parts, parts, parts.sample, 10_000)
    request = GroupRequest(0, 0, "p", 0, "?", "?", [1], "{}", 1, room, 1.0, 0, 0.0)
    episode = asyncio.run(player.play(request, 0, {}, False))
    sampled = [turn["end"] - turn["begin"] for turn in episode.turns if turn["end"] > 0]
    found = shape.cut(room)
    if found is None:
        assert sampled == [turn_tokens] * turns
        assert episode.finish_reason == "turns"
        assert len(episode.token_ids) == shape.tokens <= room
    else:
        turn, left = found
        whole = [turn_tokens] * (turn - 1)
        assert [n for n in sampled if n] == whole + [left] * bool(left)
        assert left or episode.finish_reason == "length"
        assert shape.tokens > room


def config(*keys: str) -> Config:
    given = ("environment.max_turns=3", "environment.turn_tokens=20", *keys)
    return load(CONFIGS / "smollm2-calculator.yaml", list(given))


def notes(*keys: str, trial: Trial = TRIAL, step_s: float | None = None) -> list[str]:
    lines = episode_lines(config(*keys), trial, step_s)
    return [line for line in lines if line.startswith("note")]


def test_tokens_of_turns_and_observations_are_added_up() -> None:
    lines = episode_lines(config("generator.max_completion_tokens=300"), TRIAL)
    # 3 turns of 20, and 2 observations of 32 with 5 tokens around each
    assert "= 134, of generator.max_completion_tokens 300" in lines[0]
    assert "= 320 of model.max_length 384" in lines[1]
    first = replace(TRIAL, speaks_first=True)
    assert Shape.of(config(), first).tokens == 3 * 20 + 3 * 37


@pytest.mark.parametrize(
    ("room", "said"),
    [
        (133, ["its turn 3 has 19 tokens of 20", "max_completion_tokens=134 would"]),
        (100, ["its turn 3 is not reached, and it ends as `length`"]),
        (60, ["its turn 2 has 3 tokens of 20"]),
        (19, ["its turn 1 has 19 tokens of 20"]),
    ],
)
def test_a_plan_says_what_is_cut(room: int, said: list[str]) -> None:
    (note,) = notes(f"generator.max_completion_tokens={room}")
    assert all(part in note for part in said), note
    assert notes("generator.max_completion_tokens=134") == []


def test_a_plan_says_where_the_context_is_too_short_for_the_remedy() -> None:
    (note,) = notes("environment.max_turns=12")
    assert "max_completion_tokens=647 and model.max_length=667 would" in note


def test_an_environment_slower_than_the_budget_gives_is_told() -> None:
    fits = "generator.max_completion_tokens=300"
    # 1 s to begin and 3 turns of 2 s
    assert notes(fits, step_s=7.0) == notes(fits, step_s=None) == []
    (note,) = notes(fits, step_s=2.0)
    assert "7 s in the environment are more than the 2 s" in note
    steps = math.ceil(7.0 / 2.0)
    assert f"generator.max_staleness={steps}" in note
    assert notes(fits, f"generator.max_staleness={steps}", step_s=2.0) == []
    assert notes(fits, f"generator.max_staleness={steps - 1}", step_s=2.0) != []


def test_a_synchronous_run_waits_for_every_environment() -> None:
    line = episode_lines(config("generator.max_staleness=0"), TRIAL)[-1]
    assert "waits for the slowest of its 64 episodes, so for 7 s" in line
    assert "50 s where it hangs" in line  # reset, 3 turns and reward, 10 s each


def test_the_calculator_is_tried_and_counted(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--config", str(CONFIGS / "smollm2-calculator.yaml")]) == 0
    text = capsys.readouterr().out.partition("# Episodes")[2]
    assert "3 turns x environment.turn_tokens 20 + 2 observations" in text
    assert "seconds of an episode" in text


def test_a_run_without_an_environment_has_no_such_part(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--config", str(CONFIGS / "tiny.yaml")]) == 0
    assert "# Episodes" not in capsys.readouterr().out
