"""Plays episodes with agents that nobody here wrote: a run of a command for each.

    open      a session, whose key names the episode
    start     the command behind walls, with the session's address and key, and its task
    calls     each is a turn; conversations that do not go on from another are segments
    end       the command's last line may say the reward: {"reward": 0.5}
    close     the session; what the command has left running is ended

Everything that the command does has one deadline, `environment.episode_timeout_s`: its set-up, its
run, and its scoring. The time in which it waits for the policy is not its own, and does not count.
A command that fails is an episode without a reward. One that was refused a turn by a limit, and
gave up, is not a failure.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from actors.endpoint.app import build_app
from actors.endpoint.command import Command
from actors.endpoint.endpoint import Endpoint, Limits, StartRenderer
from actors.endpoint.server import LoopbackServer
from actors.endpoint.sessions import Sample, Session
from actors.environments.host import EnvironmentFailure
from actors.environments.wire import checked_reward
from actors.generation.engine import Completion
from actors.generation.episodes import Episode
from actors.generation.episodes import Sample as Generate
from common.config.environment import EnvironmentConfig
from common.errors import RunError, UserError, first_line
from common.record.schema import FAIL, PASS
from common.record.segments import segment
from common.record.turns import turn
from common.trajectory import GroupRequest

_SHORTEST_S = 0.05


@dataclass(frozen=True)
class Ended:
    """How a run of a command ended."""

    how: str
    """`exit status 0`, or what it was instead; empty where its time was over."""
    printed: str = ""
    """The end of its output."""
    errors: str = ""
    """The end of what it said of errors."""
    seconds: float = 0.0
    """How long it ran, without the time in which it waited for the policy."""


class Agents:
    """Plays the episodes of one generator, many side by side."""

    def __init__(
        self,
        config: EnvironmentConfig,
        start_renderer: StartRenderer,
        generate: Generate,
        max_length: int,
    ) -> None:
        """Look for the command; `start` tries the walls.

        Args:
            max_length: `model.max_length`, tokens that fit into the model's context.

        Raises: `UserError` where there is no such command.
        """
        self._command = Command(config)
        self._deadline_s = config.episode_timeout_s
        self._generate = generate
        limits = Limits(
            context=max_length,
            turn_tokens=config.turn_tokens,
            turns=config.max_turns,
            forks=config.forks == "segment",
        )
        self._endpoint = Endpoint(start_renderer, limits, "policy")
        # Beginning is what costs: all at once would take each other's time.
        self._beginning = asyncio.Semaphore(max(2, os.cpu_count() or 2))
        self._playing: set[asyncio.Task[Any]] = set()

    async def start(self) -> None:
        """Try the walls. Raises: as `Command.start`."""
        await self._command.check()

    async def play(
        self, request: GroupRequest, index: int, sampling: dict[str, Any], seeded: bool
    ) -> Episode:
        """Play episode `index` of a group; as `actors.generation.episodes.Player.play`."""
        label = f"group-{request.group_id}-{index}-{request.dispatched_s}"
        sample = _sampler(self._generate, label, request, index, sampling, seeded)
        key, session = self._endpoint.sessions.open(label, sample, tokens=request.max_tokens)
        task = asyncio.current_task()
        assert task is not None
        self._playing.add(task)
        try:
            ended = await self._run(key, session, json.loads(request.reference))
        except (RunError, UserError) as error:
            ended = Ended(first_line(error))
        finally:
            self._playing.discard(task)
            if self._endpoint.sessions.find(key) is not None:
                self._endpoint.sessions.close(key)
        return as_episode(session, ended, self._deadline_s, request)

    async def shutdown(self) -> None:
        """End all that is being played."""
        playing = list(self._playing)
        for task in playing:
            task.cancel()
        await asyncio.gather(*playing, return_exceptions=True)

    async def _run(self, key: str, session: Session, task: dict[str, Any]) -> Ended:
        async with contextlib.AsyncExitStack() as stack:
            async with self._beginning:
                began_s = time.monotonic()
                run = await self._command.start(key, task)
                stack.push_async_callback(run.end)
                assert run.listener is not None
                app = build_app(self._endpoint, key)
                server = await LoopbackServer.start(app, listener=run.listener)
                stack.push_async_callback(server.stop)
                ending = asyncio.ensure_future(run.ended())
                stack.callback(ending.cancel)
                begun = asyncio.ensure_future(session.begun.wait())
                stack.callback(begun.cancel)
                await self._wait({ending, begun}, session, began_s)
            await self._wait({ending}, session, began_s)
            how = ending.result() if ending.done() else ""
            seconds = time.monotonic() - began_s - session.answered_s
            self._endpoint.sessions.close(key)  # what it has left may not speak for it
            ending.cancel()
            printed, errors = await run.end()
            return Ended(how, printed, errors, seconds)

    async def _wait(self, what: set[asyncio.Future[Any]], session: Session, began_s: float) -> None:
        """Return when one of these is done, or the command's own time is over."""
        done: set[asyncio.Future[Any]] = set()
        while not done:
            left_s = self._deadline_s - (time.monotonic() - began_s - session.answered_s)
            if left_s <= 0:
                return
            done, _ = await asyncio.wait(
                what, timeout=max(left_s, _SHORTEST_S), return_when=asyncio.FIRST_COMPLETED
            )


def as_episode(session: Session, ended: Ended, deadline_s: float, request: GroupRequest) -> Episode:
    """What the log has of a session and of the command that held it."""
    found = _outcome(session, ended, deadline_s)
    failure = found if isinstance(found, EnvironmentFailure) else None
    reward = None if isinstance(found, EnvironmentFailure) else found
    token_ids: list[int] = []
    logprobs: list[float] = []
    versions: list[int] = []
    turns, segments = [], []
    for held in session.segments:
        begin = len(token_ids)
        token_ids += held.token_ids
        logprobs += held.logprobs
        versions += held.weight_versions
        turns += [turn(begin + t.begin, begin + t.end, t.finish_reason) for t in held.turns]
        segments.append(segment(begin, len(token_ids), held.prompt_ids))
    if [each["prompt_ids"] for each in segments] == [request.prompt_ids]:
        segments = []  # the conversation that the prompt of its group begins
    verdict = "" if reward is None else PASS if reward > 0 else FAIL
    return Episode(
        token_ids,
        logprobs,
        versions,
        session.limit or "stop",
        turns=tuple(turns) or (turn(0, 0, "stop"),),
        segments=tuple(segments),
        text=session.text,
        environment_verdict=failure.kind if failure else verdict,
        environment_reason=failure.reason if failure else "",
        environment_reward=reward,
        environment_s=ended.seconds,
    )


def _outcome(
    session: Session, ended: Ended, deadline_s: float
) -> EnvironmentFailure | float | None:
    """Why nobody can say what the episode was worth, or the reward that the command gave."""
    if not ended.how:
        return EnvironmentFailure(
            "timeout",
            f"the command took more than {deadline_s:g} s of its own, set-up and scoring included",
        )
    gave_up = bool(session.limit) and ended.how.startswith("exit status")
    if (ended.how != "exit status 0" and not gave_up) or not session.segments:
        return EnvironmentFailure("error", _reason(session, ended))
    try:
        return _reward(ended.printed)
    except (TypeError, ValueError) as error:
        return EnvironmentFailure("error", f"the command's last line: {error}")


def _reason(session: Session, ended: Ended) -> str:
    reason = f"the command ended: {ended.how}"
    if not session.segments:
        reason += ", without a turn of the policy"
    lines = [line.strip() for line in ended.errors.splitlines() if line.strip()]
    if lines:
        reason += f": {lines[-1]}"
    refused = [
        f"{name} x{count}"
        for name, count in sorted(session.counts.items())
        if name not in ("requests", "malformed") and not name.startswith("not followed")
    ]
    if refused:
        reason += f" (calls refused: {', '.join(refused)})"
    return reason[:600]


def _reward(printed: str) -> float | None:
    """The reward in the last line of a command's output; None where that is another line.

    Raises: `TypeError` or `ValueError` for one that is no finite number.
    """
    lines = [line for line in printed.splitlines() if line.strip()]
    try:
        said = json.loads(lines[-1]) if lines else None
    except (ValueError, RecursionError):
        return None
    if not isinstance(said, dict) or "reward" not in said:
        return None
    return checked_reward(said["reward"], "the reward")


def _sampler(
    generate: Generate,
    label: str,
    request: GroupRequest,
    index: int,
    sampling: dict[str, Any],
    seeded: bool,
) -> Sample:
    """What gives a session its turns."""
    asked: Counter[str] = Counter()

    async def sample(ids: list[int], room: int, stop: Sequence[int]) -> Completion:
        own: dict[str, Any] = {"max_tokens": room, "stop": [*sampling.get("stop", ()), *stop]}
        before = hashlib.sha256(json.dumps(ids).encode()).hexdigest()
        asked[before] += 1
        if seeded and request.seed is not None:
            own["seed"] = _seed(request.seed, index, before, asked[before])
        return await generate(f"{label}-turn-{asked.total()}", ids, sampling | own)

    return sample


def _seed(seed: int, index: int, before: str, time_asked: int) -> int:
    """Seed of a turn: by what stands before it, so that calls beside each other keep theirs."""
    digest = hashlib.sha256(f"{seed}/{index}/{before}/{time_asked}".encode()).digest()
    return int.from_bytes(digest[:6])
