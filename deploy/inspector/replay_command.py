"""Plays an episode of the log again by running its command, which is answered from the log.

A command is not told what the policy said: it asks for it, as it would ask OpenAI. So it is run as
a generator runs it (`actors.endpoint.agents`), and each of its calls is rendered to token ids. The
turn of the log that stands behind the same ids is the answer. Calls that were made beside each
other may come in any order. A call behind ids that the log does not have is where the two part.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from actors.endpoint.agents import Agents
from actors.generation.engine import Completion
from actors.generation.episodes import Episode
from actors.rendering.renderer import Renderer
from common.config.sections import Config
from common.errors import RunError
from deploy.inspector.episode_parting import Parting, Row, end_of, request_of, same_reward

_SHOWN = 400
"""Characters of a call that are shown."""


async def by_command(config: Config, row: Row, tokenizer: Any) -> tuple[int, Parting | None]:
    """Play the episode of a row again.

    Returns:
        Turns of the episode in the log, and where the two part; None where they do not.

    Raises: `UserError` where the command cannot be run here.
    """

    def start_renderer(tools: Sequence[Mapping[str, Any]]) -> Renderer:
        return Renderer.start(
            tokenizer,
            config.data,
            tools=tools,
            tool_parser=config.environment.tool_parser,
            thoughts=config.environment.thoughts,
        )

    logged = _LoggedTurns(row, tokenizer)
    agents = Agents(config.environment, start_renderer, logged.sample, config.model.max_length)
    await agents.start()
    # Templates are tried before the command runs, so that its calls do not wait for it.
    await asyncio.to_thread(start_renderer, ())
    request = request_of(row, config)
    playing = asyncio.ensure_future(agents.play(request, row["completion_index"], {}, False))
    either: set[asyncio.Future[Any]] = {playing, logged.parted}
    try:
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if logged.parted.done():
            return len(logged.turns), logged.parted.result()
        return len(logged.turns), logged.difference(playing.result())
    finally:
        playing.cancel()
        await asyncio.gather(playing, return_exceptions=True)


@dataclass(frozen=True)
class _Turn:
    """A turn of the log: the token ids it stands behind, and where it is in the row."""

    behind: list[int]
    span: slice
    finish: str


class _LoggedTurns:
    """The policy of the log, asked by a command."""

    def __init__(self, row: Row, tokenizer: Any) -> None:
        self._row = row
        self._tokenizer = tokenizer
        self.turns = _turns(row)
        self._left = list(self.turns)
        self.parted: asyncio.Future[Parting] = asyncio.get_running_loop().create_future()
        """Done when a call has come that the log does not have."""

    async def sample(
        self, request_id: str, token_ids: list[int], sampling: dict[str, Any]
    ) -> Completion:
        """Say what the log says behind these ids.

        Raises: `RunError`, which the command is told, where it says nothing.
        """
        turn = next((turn for turn in self._left if turn.behind == token_ids), None)
        if turn is None:
            if not self.parted.done():
                self.parted.set_result(self._other_call(token_ids))
            raise RunError("the log has no turn behind this call")
        self._left.remove(turn)
        return Completion(
            self._row["token_ids"][turn.span],
            self._row["behaviour_logprobs"][turn.span],
            self._row["weight_versions"][turn.span],
            turn.finish,
        )

    def difference(self, again: Episode) -> Parting | None:
        """What differs once the command has ended, its calls being the same."""
        taken, row = len(self.turns) - len(self._left), self._row
        recorded, replayed = (
            end_of(*found)
            for found in (
                (row["finish_reason"], row["environment_verdict"], row["environment_reason"]),
                (again.finish_reason, again.environment_verdict, again.environment_reason),
            )
        )
        if self._left:
            asked = self._words(self._left[0].behind, 0)
            return Parting(taken, "call", asked, f"no more calls: it ended by {replayed}")
        rewards = row["environment_reward"], again.environment_reward
        if None not in rewards and not same_reward(*rewards):
            return Parting(taken, "reward", str(rewards[0]), str(rewards[1]))
        return Parting(taken, "end", recorded, replayed) if recorded != replayed else None

    def _other_call(self, token_ids: list[int]) -> Parting:
        """Where a call differs from the one of the log that is most like it."""
        taken = len(self.turns) - len(self._left)
        common = [_common(turn.behind, token_ids) for turn in self._left]
        if not common:
            return Parting(taken, "call", "no more calls", self._words(token_ids, 0))
        begin = max(common)
        like = self._left[common.index(begin)].behind
        return Parting(taken, "call", self._words(like, begin), self._words(token_ids, begin))

    def _words(self, token_ids: list[int], begin: int) -> str:
        """What a call says from token `begin` on."""
        text = str(self._tokenizer.decode(token_ids[begin:], skip_special_tokens=False))
        more = "..." if len(text) > _SHOWN else ""
        return f"{'... ' if begin else ''}{text[:_SHOWN]!r}{more}"


def _turns(row: Row) -> list[_Turn]:
    whole = {"begin": 0, "end": len(row["token_ids"]), "prompt_ids": row["prompt_ids"]}
    found = []
    for segment in row["segments"] or [whole]:
        for turn in row["turns"]:
            if segment["begin"] <= turn["begin"] < turn["end"] <= segment["end"]:
                before = row["token_ids"][segment["begin"] : turn["begin"]]
                span = slice(turn["begin"], turn["end"])
                found.append(_Turn(segment["prompt_ids"] + before, span, turn["finish"]))
    return found


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Leading tokens that two calls share."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))
