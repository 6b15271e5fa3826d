"""What a generator has instead of a host where environments are a pool of actors.

    begin   every actor is up; gives the schemas of the tools
    reset, step, reward, close      as `actors.environments.host` has them, each asked of one actor

An episode stays with its actor, that with the fewest of this generator's. Hosts keep the deadlines
of environments. An actor that gives no sign of life behind them is killed, and Ray starts it again.
The episodes of an actor that is gone have failed, and have no reward. New ones go to the others, or
wait until it is back.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from ray.exceptions import RayActorError, RayTaskError

from actors.environments.actor import EnvironmentActor
from actors.environments.base import Reply
from actors.environments.host import Answer, EnvironmentFailure
from actors.environments.worker import START_TIMEOUT_S
from common.config.environment import EnvironmentConfig
from common.errors import RunError, first_line
from common.supervision.calls import Call, Handle, Ref, ask, call

SLACK_S = 15.0
"""Seconds in which an actor shows a sign of life. A call may take so long beyond what its host
allows the environment, before it is asked for one."""
_AWAY_S = 5.0
"""For so long an actor that has died is asked for no new episode, where there are others."""
_PAUSE_S = 0.5


class EnvironmentClient:
    """Plays the episodes of one generator in a pool of actors. It belongs to one event loop."""

    def __init__(
        self, config: EnvironmentConfig, generator: str, actors: Sequence[Handle[EnvironmentActor]]
    ) -> None:
        """Keep the settings; `start` waits for the actors."""
        self._generator = generator
        self._actors = list(actors)
        self._step_s = config.step_timeout_s + SLACK_S
        self._alive_s = SLACK_S
        self._back_s = START_TIMEOUT_S
        self._episodes: dict[str, int] = {}
        self._load: Counter[int] = Counter()
        self._away: dict[int, float] = {}
        self.tools: list[dict[str, Any]] = []
        """JSON schemas of the environment's tools, from `start` on."""

    async def start(self) -> None:
        """Wait for all actors, and ask for the tools.

        Raises:
            UserError: the environment cannot be used; the message says why.
            RunError: an actor did not come up.
        """
        begun = [ask(actor, EnvironmentActor.begin, self._generator) for actor in self._actors]
        deadline_s = 2 * START_TIMEOUT_S + SLACK_S  # the process, and the schemas
        try:
            async with asyncio.timeout(deadline_s):
                for tools in begun:
                    self.tools = await tools
        except TimeoutError as error:
            raise RunError(
                f"the actors of environments were not up within {deadline_s:.0f} s: see whether "
                "the nodes of environment.labels are busy, or lower environment.workers"
            ) from error
        except RayTaskError as error:
            raise error.cause from None
        except RayActorError as error:
            raise RunError(
                f"an actor of environments died while it started: {first_line(error)}; see its "
                "log, and how much memory its node has"
            ) from error

    async def reset(self, key: str, task: Mapping[str, Any], seed: int) -> Answer:
        """Begin the episode `key`, in an actor that lives."""
        asked = call(EnvironmentActor.reset, self._named(key), task, seed)
        ends = time.monotonic() + self._back_s
        while True:
            self._episodes[key] = index = self._least_loaded()
            self._load[index] += 1
            try:
                return await self._in_time(key, index, asked, self._step_s)
            except RayActorError as error:  # no environment is to blame: another has the episode
                died = self._died(key, index, asked, error)
            if time.monotonic() > ends:
                return died
            await asyncio.sleep(_PAUSE_S)

    async def step(self, key: str, reply: Reply) -> Answer:
        """The environment's answer to a reply of the policy."""
        return await self._answer(key, call(EnvironmentActor.step, self._named(key), reply))

    async def reward(self, key: str, reply: str) -> Answer:
        """What an episode is worth that a limit ends here, on top of what its steps gave."""
        return await self._answer(key, call(EnvironmentActor.reward, self._named(key), reply))

    def close(self, key: str) -> None:
        """End an episode without waiting for it; safe for one that has ended."""
        index = self._forget(key)
        if index is not None:
            ask(self._actors[index], EnvironmentActor.close, self._named(key))

    async def shutdown(self) -> None:
        """Close what is open; the actors serve others too."""
        for key in list(self._episodes):
            self.close(key)

    async def _answer(self, key: str, asked: Call[EnvironmentActor, Answer]) -> Answer:
        """What the episode's actor says. Without it the episode has failed."""
        index = self._episodes.get(key)
        if index is None:
            return EnvironmentFailure("error", f"{asked.name}: episode {key} is not there")
        try:
            return await self._in_time(key, index, asked, self._step_s)
        except RayActorError as error:
            return self._died(key, index, asked, error)

    async def _in_time(
        self, key: str, index: int, asked: Call[EnvironmentActor, Answer], look_s: float
    ) -> Answer:
        """The answer of an actor. One that shows no sign of life has to start again.

        Args:
            look_s: seconds after which the actor is asked whether it lives. While it does, its
                host keeps the deadlines, and other episodes may have to begin before.

        Raises: `RayActorError` where it is not there.
        """
        actor = self._actors[index]
        answer = asyncio.ensure_future(_awaited(asked.to(actor)))
        try:
            while not (await asyncio.wait((answer,), timeout=look_s))[0]:
                async with asyncio.timeout(self._alive_s):
                    await ask(actor, EnvironmentActor.ping)
            return answer.result()
        except TimeoutError:
            actor.kill(again=True)
            self._lose(key, index)
            return EnvironmentFailure(
                "timeout",
                f"{asked.name}: actor {index} of the environments gave no sign of life within "
                f"{self._alive_s:g} s, and is started again",
                seconds=look_s + self._alive_s,
            )
        finally:
            answer.cancel()

    def _died(
        self,
        key: str,
        index: int,
        asked: Call[EnvironmentActor, Answer],
        error: RayActorError,
    ) -> EnvironmentFailure:
        self._lose(key, index)
        return EnvironmentFailure(
            "error", f"{asked.name}: actor {index} of the environments died: {first_line(error)}"
        )

    def _lose(self, key: str, index: int) -> None:
        self._forget(key)
        self._away[index] = time.monotonic() + _AWAY_S

    def _forget(self, key: str) -> int | None:
        index = self._episodes.pop(key, None)
        if index is not None:
            self._load[index] -= 1
        return index

    def _least_loaded(self) -> int:
        now = time.monotonic()
        return min(
            range(len(self._actors)),
            key=lambda index: (self._away.get(index, 0.0) > now, self._load[index]),
        )

    def _named(self, key: str) -> str:
        return f"{self._generator}/{key}"


async def _awaited(answer: Ref[Answer]) -> Answer:
    return await answer
