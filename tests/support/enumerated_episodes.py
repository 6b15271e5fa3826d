"""Episodes whose every value can be enumerated.

A real player, a policy whose every chance is known, and an environment in this process that values
what was said.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from actors.environments.base import Reply
from actors.environments.host import EnvironmentFailure, Observation
from actors.generation.engine import Completion
from actors.generation.episodes import Answer, Episode, Player
from actors.generation.rows import rollout_batch
from actors.rendering.renderer import Reply as Read
from common.config.environment import EnvironmentConfig
from common.config.load import load_config
from common.record.turns import check_turns
from common.trajectory import Begun, GroupRequest
from deploy.credit.episodes import begun_at

PROMPT, TURNS, TURN_TOKENS = [1, 2, 3], 3, 2
SAID = list(itertools.product((10, 11), repeat=TURNS * TURN_TOKENS))
TASK = json.dumps({"prompt": "?"})
REQUEST = GroupRequest(5, 5, "p", 0, "?", "?", PROMPT, TASK, 1, 40, 1.0, 3, 0.0, seed=77)
CONFIG = load_config([], ["model.path=m"])


class Table:
    """An environment that values a turn, and then the whole, by what was said up to there.

    Args:
        dice: added to what it says behind turn `late`, to be told something else.
    """

    def __init__(self, dice: str = "", late: int = 0, ends: int = TURNS) -> None:
        self._dice, self._late, self._ends = dice, late, ends
        self.said, self.seed = list[str](), 0
        self.fails_at, self.closed = -1, False

    async def reset(self, key: str, task: dict[str, Any], seed: int) -> Answer:
        self.said, self.seed = [], seed
        return Observation(f"go{self._dice if self._late == 0 else ''}")

    async def step(self, key: str, reply: Reply) -> Answer:
        self.said.append(str(reply))
        if len(self.said) == self.fails_at:
            return EnvironmentFailure("timeout", "too slow")
        draw = random.Random("/".join(self.said))
        reward = round(draw.random(), 3)
        dice = self._dice if len(self.said) == self._late else ""
        return Observation(f"{draw.randrange(9)}{dice}", reward, done=len(self.said) >= self._ends)

    async def reward(self, key: str, reply: str) -> Answer:
        raise AssertionError("no limit is reached")

    def close(self, key: str) -> None:
        self.closed = True


class Plain:
    """A renderer: an observation is its characters' codes between 50 and 51."""

    stop_token_ids = (99,)

    def behind(self, messages: list[dict[str, Any]], *, ended: bool) -> list[int]:
        return [50, *(ord(c) for m in messages for c in m["content"]), 51]

    def ended(self, token_ids: Sequence[int]) -> bool:
        return False

    def parse(self, token_ids: Sequence[int]) -> Read:
        return Read(" ".join(map(str, token_ids)), "", (), "")


class Characters:
    def __call__(self, text: str, *, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) for c in text]}

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
        return "".join(chr(t) for t in token_ids)


def chance(before: Sequence[int], token: int) -> float:
    """Of the policy, behind all tokens of the episode so far."""
    of_ten = random.Random(repr(list(before))).uniform(0.1, 0.9)
    return of_ten if token == 10 else 1 - of_ten


class Policy:
    """Samples by `chance`, or says what it is given; notes what it was asked."""

    def __init__(self, seed: int = 0, script: Sequence[int] = ()) -> None:
        self._random, self._script = random.Random(seed), list(script)
        self.asked: list[tuple[list[int], dict[str, Any]]] = []

    async def __call__(
        self, request_id: str, token_ids: list[int], sampling: dict[str, Any]
    ) -> Completion:
        self.asked.append((token_ids, sampling))
        before, said = token_ids[len(PROMPT) :], list[int]()
        while len(said) < sampling["max_tokens"]:
            ten = self._random.random() < chance(before + said, 10)
            said.append(self._script.pop(0) if self._script else 10 if ten else 11)
        return Completion(said, [-0.5] * len(said), [3] * len(said), "length")


def play(host: Table, policy: Policy, begun: Begun | None = None, index: int = 0) -> Episode:
    config = EnvironmentConfig(name="guess", turn_tokens=TURN_TOKENS)
    player = Player(config, host, Plain(), Characters(), policy, 64)
    asked = replace(REQUEST, begun=begun)
    episode = asyncio.run(player.play(asked, index, {"temperature": 1.0}, True))
    check_turns(rollout_batch(asked, {0: episode}, [episode.text], "g"))
    return episode


EVERY = [play(Table(), Policy(script=said)) for said in SAID]
"""Every episode that there can be."""


def begun(episode: Episode, point: int) -> Begun:
    (row,) = rollout_batch(REQUEST, {0: episode}, [episode.text], "g").to_pylist()
    return begun_at(row, point, CONFIG)


def points_of(episode: Episode) -> list[int]:
    return [t for turn in episode.turns for t in range(turn["begin"], turn["end"])]


def value(prefix: Sequence[int]) -> float:
    """Exact, by going through every episode that begins so."""
    return sum(
        math.prod(
            chance(each.token_ids[:t], each.token_ids[t])
            for t in points_of(each)
            if t >= len(prefix)
        )
        * (each.environment_reward or 0.0)
        for each in EVERY
        if each.token_ids[: len(prefix)] == list(prefix)
    )
