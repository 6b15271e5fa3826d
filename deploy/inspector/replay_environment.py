"""Plays an episode of the log again in its environment, which is told what the policy said.

It is played as a generator plays it (`actors.generation.episodes`), with the log in the policy's
place. What the environment says is compared token by token, its rewards and states beside it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from actors.environments.base import Reply
from actors.environments.host import EnvironmentHost, Observation
from actors.generation.engine import Completion
from actors.generation.episodes import Answer, Player
from actors.rendering.renderer import Renderer
from common.config.sections import Config
from deploy.inspector.episode_parting import (
    FAILED,
    Parting,
    Row,
    end_of,
    request_of,
    same_reward,
)


@dataclass(frozen=True)
class Said:
    """What the environment said: first of all, or to a turn."""

    tokens: tuple[int, ...]
    """Given to the policy before it spoke again."""
    reward: float | None = None
    state: str | None = None


@dataclass(frozen=True)
class _Played:
    said: list[Said]
    end: str
    failed: bool


async def in_environment(config: Config, row: Row, tokenizer: Any) -> tuple[int, Parting | None]:
    """Play the episode of a row again.

    Returns:
        Turns of the episode in the log, and where the two part; None where they do not.
    """
    (found,) = await all_in_environment(config, [row], tokenizer)
    return found


async def all_in_environment(
    config: Config, rows: Sequence[Row], tokenizer: Any
) -> list[tuple[int, Parting | None]]:
    """Play the episodes of rows again, side by side; each as `in_environment`."""
    environment = replace(config.environment, workers=1)
    host = EnvironmentHost(environment)
    try:
        await host.start()
        renderer = await asyncio.to_thread(
            Renderer.of_environment, tokenizer, config.data, environment, host.tools
        )
        playing = [_again(config, row, host, renderer, tokenizer) for row in rows]
        return await asyncio.gather(*playing)
    finally:
        await host.shutdown()


async def _again(
    config: Config, row: Row, host: EnvironmentHost, renderer: Renderer, tokenizer: Any
) -> tuple[int, Parting | None]:
    logged = _Logged(host, row)
    length = config.model.max_length
    player = Player(config.environment, logged, renderer, tokenizer, logged.sample, length)
    again = await player.play(request_of(row, config), row["completion_index"], {}, False)
    recorded = _Played(
        _said(row["token_ids"], logged.turns),
        end_of(row["finish_reason"], row["environment_verdict"], row["environment_reason"]),
        row["environment_verdict"] in FAILED,
    )
    replayed = _Played(
        _said(again.token_ids, again.turns[: logged.taken]),
        end_of(again.finish_reason, again.environment_verdict, again.environment_reason),
        again.environment_verdict in FAILED,
    )
    return len(logged.turns), _parting(recorded, replayed, tokenizer)


class _Logged:
    """The policy of the log, and the environment that it speaks to until the two part."""

    def __init__(self, host: EnvironmentHost, row: Row) -> None:
        self._host = host
        self._row = row
        failed = row["environment_verdict"] in FAILED
        self.turns: list[dict[str, Any]] = row["turns"]
        """Where it spoke: an environment that fails to begin leaves an empty turn."""
        if failed and all(turn["begin"] == turn["end"] for turn in self.turns):
            self.turns = []
        self.taken = 0
        self._parted = False

    async def sample(
        self, request_id: str, token_ids: list[int], sampling: dict[str, Any]
    ) -> Completion:
        """Say what the log says next. An empty turn ends the episode where it has parted."""
        here = token_ids[len(self._row["prompt_ids"]) :]
        turn = self.turns[self.taken] if self.taken < len(self.turns) else None
        if turn is None or here != self._row["token_ids"][: turn["begin"]]:
            self._parted = True
            return Completion([], [], [], "stop")
        self.taken += 1
        span = slice(turn["begin"], turn["end"])
        return Completion(
            self._row["token_ids"][span],
            self._row["behaviour_logprobs"][span],
            self._row["weight_versions"][span],
            turn["finish"],
        )

    async def reset(self, key: str, task: dict[str, Any], seed: int) -> Answer:
        return await self._host.reset(key, task, seed)

    async def step(self, key: str, reply: Reply) -> Answer:
        return Observation(done=True) if self._parted else await self._host.step(key, reply)

    async def reward(self, key: str, reply: str) -> Answer:
        return await self._host.reward(key, reply)

    def close(self, key: str) -> None:
        self._host.close(key)


def _said(token_ids: Sequence[int], turns: Sequence[Mapping[str, Any]]) -> list[Said]:
    """What the environment said before the first turn, and to each."""
    ends = [0, *(turn["end"] for turn in turns)]
    begins = [*(turn["begin"] for turn in turns), len(token_ids)]
    return [
        Said(tuple(token_ids[end:begin]), turn.get("reward"), turn.get("state"))
        for end, begin, turn in zip(ends, begins, [{}, *turns], strict=True)
    ]


def _parting(recorded: _Played, replayed: _Played, tokenizer: Any) -> Parting | None:
    """Where the two part; None where they are the same."""

    def words(played: _Played, tokens: tuple[int, ...]) -> str:
        text = repr(tokenizer.decode(list(tokens), skip_special_tokens=False))
        return text if tokens else f"nothing more: it ended by {played.end}"

    for turn, (mine, theirs) in enumerate(zip(recorded.said, replayed.said, strict=False)):
        if mine.tokens != theirs.tokens:
            both = words(recorded, mine.tokens), words(replayed, theirs.tokens)
            return Parting(turn, "observation", *both)
        if turn == len(recorded.said) - 1 and recorded.failed != replayed.failed:
            break
        if not same_reward(mine.reward, theirs.reward):
            return Parting(turn, "reward", str(mine.reward), str(theirs.reward))
        if mine.state != theirs.state:
            return Parting(turn, "state", str(mine.state), str(theirs.state))
    if recorded.end != replayed.end:  # one that failed there has no reward to compare
        return Parting(len(recorded.said) - 1, "end", recorded.end, replayed.end)
    return None
