"""Plays episodes: the policy's turns are sampled here, and an environment answers between them.

    reset       what the environment says first, if it says anything
    a turn      sampled by the engine, from exactly the tokens that stand there
    step        the environment reads the turn's text and answers
    behind      the tokens of the answer, given to the policy, then the next turn

Tokens are only ever appended, and never leave the generator; the environment sees text. An episode
ends as `finish_reason` says: `stop` where it ended by itself, `length`, `turns` or `context` where
a limit did. A limit is no failure: the environment is asked what the episode was worth. A failure
of the environment ends the episode where it stands, without a reward.

An episode may go on from the beginning of another (`GroupRequest.begun`). The environment is told
what the policy said then, turn after turn, and has to say the same again. What is on record is
given, up to the token at which the policy goes on.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from actors.environments.base import Reply, ToolCall
from actors.environments.host import EnvironmentFailure, Observation
from actors.generation.begun import check_reached, check_repeats
from actors.generation.engine import Completion
from actors.rendering.renderer import Reply as Read
from common.config.environment import EnvironmentConfig
from common.record.schema import FAIL, PASS
from common.record.turns import turn
from common.supervision.faults import reached
from common.trajectory import GroupRequest

Answer = Observation | EnvironmentFailure
Sample = Callable[[str, list[int], dict[str, Any]], Awaitable[Completion]]
"""(request id, token ids, sampling parameters) -> what the policy said."""

_CUT = " [...] "


class Host(Protocol):
    """What is used of `actors.environments.host.EnvironmentHost`."""

    async def reset(self, key: str, task: dict[str, Any], seed: int) -> Answer: ...

    async def step(self, key: str, reply: Reply) -> Answer: ...

    async def reward(self, key: str, reply: str) -> Answer: ...

    def close(self, key: str) -> None: ...


class Appends(Protocol):
    """What is used of `actors.rendering.renderer.Renderer`."""

    @property
    def stop_token_ids(self) -> tuple[int, ...]: ...

    def behind(self, messages: list[dict[str, Any]], *, ended: bool) -> list[int]: ...

    def ended(self, token_ids: Sequence[int]) -> bool: ...

    def parse(self, token_ids: Sequence[int]) -> Read: ...


class Shortens(Protocol):
    """What is used of a Hugging Face tokenizer."""

    def __call__(self, text: str, *, add_special_tokens: bool) -> Any: ...

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> Any: ...


@dataclass(frozen=True)
class Episode(Completion):
    """A completion of several turns. Given tokens have a log-probability of NaN."""

    turns: tuple[dict[str, Any], ...] = ()
    """Entries of the column `turns`."""
    segments: tuple[dict[str, Any], ...] = ()
    """Entries of the column `segments`; none where there is one conversation, behind the prompt."""
    text: str = ""
    """What rules judge: the words of the last turn."""
    feedback: str = ""
    """What the environment said of the policy's turns, one after another."""
    environment_verdict: str = ""
    environment_reason: str = ""
    environment_reward: float | None = None
    environment_s: float = 0.0


def as_episode(said: Completion) -> Episode:
    """An answer as an episode of one turn: all of it that was sampled."""
    if isinstance(said, Episode):
        return said
    only = turn(said.guidance_length, len(said.token_ids), said.finish_reason)
    return Episode(
        said.token_ids,
        said.logprobs,
        said.weight_versions,
        said.finish_reason,
        said.guidance_length,
        turns=(only,),
    )


@dataclass
class _Open:
    """An episode under way."""

    key: str
    room: int
    """Tokens that it may have, given ones included."""
    context: int
    """Tokens that fit behind its prompt."""
    version: int
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    weight_versions: list[int] = field(default_factory=list)
    turns: list[dict[str, Any]] = field(default_factory=list)
    repeated: int = 0
    """Tokens at its start that are those of an episode on record."""
    text: str = ""
    heard: list[str] = field(default_factory=list)
    """What the environment said of turns."""
    reward: float | None = None
    seconds: float = 0.0
    failure: EnvironmentFailure | None = None

    def give(self, token_ids: list[int]) -> str:
        """Append tokens that were not sampled, or say which limit leaves no token behind them."""
        full = self.limit(len(token_ids))
        if not full:
            self._append(token_ids)
        return full

    def repeat(self, token_ids: list[int], finish: str) -> None:
        """Append what is on record of a turn; of a whole one nothing is left to sample."""
        self._append(token_ids)
        self.repeated = len(self.token_ids)
        if finish:
            self.turns.append(turn(self.repeated, self.repeated, finish))

    def _append(self, token_ids: list[int]) -> None:
        version = self.weight_versions[-1] if self.weight_versions else self.version
        self.token_ids += token_ids
        self.logprobs += [math.nan] * len(token_ids)
        self.weight_versions += [version] * len(token_ids)

    def limit(self, more: int = 0) -> str:
        """The limit that leaves no token to sample behind `more` tokens; "" where there is room."""
        count = len(self.token_ids) + more
        if count >= self.room:
            return "length"
        return "context" if count >= self.context else ""

    def take(self, said: Completion) -> None:
        """Append a turn that was sampled."""
        begin = len(self.token_ids)
        self.token_ids += said.token_ids
        self.logprobs += said.logprobs
        self.weight_versions += said.weight_versions
        self.turns.append(turn(begin, len(self.token_ids), said.finish_reason))

    def hear(self, answer: Answer) -> Observation | None:
        """Note what the environment said of the last turn; None where it failed."""
        self.seconds += answer.seconds
        if isinstance(answer, EnvironmentFailure):
            self.failure = answer
            return None
        if answer.reward is not None:
            self.reward = (self.reward or 0.0) + answer.reward
            if self.turns:
                self.turns[-1]["reward"] = (self.turns[-1]["reward"] or 0.0) + answer.reward
        if self.turns and answer.text:
            self.heard.append(answer.text)
        if self.turns and answer.state is not None:
            self.turns[-1]["state"] = answer.state
        if self.turns and answer.results:
            self.turns[-1]["calls"] = len(answer.results)
            self.turns[-1]["failed"] = sum(result.failed for result in answer.results)
        return answer

    def closed(self, finish_reason: str) -> Episode:
        """The episode as it ended."""
        if not self.turns:  # it failed before the policy could speak
            self.turns.append(turn(len(self.token_ids), len(self.token_ids), "stop"))
        verdict, reason = "", ""
        if self.failure is not None:
            verdict, reason = self.failure.kind, self.failure.reason
        elif self.reward is not None:
            verdict = PASS if self.reward > 0 else FAIL
        return Episode(
            self.token_ids,
            self.logprobs,
            self.weight_versions,
            finish_reason,
            self.repeated,
            turns=tuple(self.turns),
            text=self.text,
            feedback="\n".join(self.heard),
            environment_verdict=verdict,
            environment_reason=reason,
            environment_reward=None if self.failure else self.reward,
            environment_s=self.seconds,
        )


class Player:
    """Plays the episodes of one generator, many side by side."""

    def __init__(
        self,
        config: EnvironmentConfig,
        host: Host,
        renderer: Appends,
        tokenizer: Shortens,
        sample: Sample,
        max_length: int,
    ) -> None:
        """Both `host` and `renderer` have been started.

        Args:
            max_length: `model.max_length`, tokens that fit into the model's context.
        """
        self._config = config
        self._host = host
        self._renderer = renderer
        self._tokenizer = tokenizer
        self._sample = sample
        self._max_length = max_length

    async def play(
        self, request: GroupRequest, index: int, sampling: dict[str, Any], seeded: bool
    ) -> Episode:
        """Play episode `index` of a group.

        Args:
            sampling: parameters of every turn but for its length, stop tokens and seed.
            seeded: whether turns have seeds of their own, which follow from the request's.

        Raises:
            UserError: the environment does not say again what it said on record.
        """
        key = f"group-{request.group_id}-{index}-{request.dispatched_s}"
        state = _Open(
            key,
            request.max_tokens,
            self._max_length - len(request.prompt_ids),
            request.dispatch_version,
        )
        try:
            finish = await self._through(state, request, index, sampling, seeded)
            if request.begun is not None and state.failure is None:
                check_reached(request.begun, len(state.turns))
        finally:
            self._host.close(key)
        return state.closed(finish)

    async def _through(
        self,
        state: _Open,
        request: GroupRequest,
        index: int,
        sampling: dict[str, Any],
        seeded: bool,
    ) -> str:
        """Play to the end; returns the finish reason."""
        seed = environment_seed(request)
        said = state.hear(await self._host.reset(state.key, _task(request), seed))
        if said is None:
            return "stop"
        full = state.give(self._tokens_of(said, ended=False)) if said.text else state.limit()
        while not full:
            own_seed = turn_seed(request, index, len(state.turns)) if seeded else None
            turn_ids = await self._turn(state, request, sampling, own_seed)
            if state.turns[-1]["finish"] == "length" and self._config.cut_turns == "end":
                full = "length"
                break
            said = state.hear(await self._host.step(state.key, self._reply(state, turn_ids)))
            reached("observation received")
            if said is None or said.done:
                return "stop"
            if len(state.turns) == self._config.max_turns:
                full = "turns"
                break
            full = state.give(self._tokens_of(said, ended=self._renderer.ended(turn_ids)))
        state.hear(await self._host.reward(state.key, state.text))
        return full

    async def _turn(
        self, state: _Open, request: GroupRequest, sampling: dict[str, Any], seed: int | None
    ) -> list[int]:
        """Sample the next turn; returns its tokens. What is on record of it is not sampled."""
        begun, number, known = request.begun, len(state.turns), list[int]()
        if begun is not None and number < len(begun.turns):
            check_repeats(begun, number, state.token_ids, self._tokenizer)
            begin, end, finish = begun.turns[number]
            known = list(begun.token_ids[begin:end])
            state.repeat(known, finish)
            if finish:
                return known
        used = len(state.token_ids)
        left = self._config.turn_tokens - len(known)
        limits = (left, state.room - used, state.context - used)
        own: dict[str, Any] = {
            "max_tokens": min(limits),
            "stop": [*sampling.get("stop", ()), *self._renderer.stop_token_ids],
        }
        if seed is not None:
            own["seed"] = seed
        request_id = f"{state.key}-turn-{len(state.turns)}"
        said = await self._sample(request_id, request.prompt_ids + state.token_ids, sampling | own)
        state.take(said)
        return known + said.token_ids

    def _reply(self, state: _Open, turn_ids: list[int]) -> Reply:
        """What the environment is told of a turn. A malformed one comes as a call with a problem,
        where there are tools, so that the policy is told what was wrong."""
        read = self._renderer.parse(turn_ids)
        state.text = read.text
        calls = [ToolCall(call.name, call.arguments) for call in read.calls]
        if read.malformed:
            calls.append(ToolCall("", problem=read.malformed))
        return Reply(read.text, calls)

    def _tokens_of(self, said: Observation, *, ended: bool) -> list[int]:
        """The tokens that bring an observation, and ask the policy to speak again."""
        if said.results and self._config.role == "tool":
            messages = [
                {"role": "tool", "name": result.name, "content": self._short(result.text)}
                for result in said.results
            ]
        else:
            messages = [{"role": self._config.role, "content": self._short(said.text)}]
        return self._renderer.behind(messages, ended=ended)

    def _short(self, text: str) -> str:
        """`text`, its middle left out where it has too many tokens."""
        most = self._config.observation_tokens
        if len(text) <= most:  # a token has at least one character
            return text
        ids = list(self._tokenizer(text, add_special_tokens=False)["input_ids"])
        if len(ids) <= most:
            return text
        head, tail = ids[: (most + 1) // 2], ids[len(ids) - most // 2 :]
        parts = (self._tokenizer.decode(part, skip_special_tokens=False) for part in (head, tail))
        return _CUT.join(parts)


def turn_seed(request: GroupRequest, index: int, number: int) -> int | None:
    """Seed of a turn: a pure function of the group's seed, the episode and the turn's place."""
    if request.seed is None:
        return None
    digest = hashlib.sha256(f"{request.seed}/{index}/{number}".encode()).digest()
    return int.from_bytes(digest[:6])


def environment_seed(request: GroupRequest) -> int:
    """Seed of the environment: the same for all episodes of a group, and for each of its epochs."""
    if request.begun is not None:
        return request.begun.seed
    if request.seed is not None:
        return request.seed
    digest = hashlib.sha256(f"{request.prompt_id}/{request.epoch}".encode()).digest()
    return int.from_bytes(digest[:6])


def _task(request: GroupRequest) -> dict[str, Any]:
    """What the environment is told of the question: the columns of its row."""
    task: dict[str, Any] = json.loads(request.reference)
    return task
