"""A host of environments in an actor of its own: one member of a pool on nodes with CPUs.

`actors.environments.client` asks it, from inside the generators. Ray starts it again, in the same
place, when its process or its node has died; its episodes have ended then.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from actors.environments.base import Reply
from actors.environments.host import Answer, EnvironmentFailure, EnvironmentHost
from common.config.environment import EnvironmentConfig
from common.errors import RunError, UserError
from common.supervision.stacks import arm


class EnvironmentActor:
    """Plays episodes of several generators, in processes of this node. All methods are coroutines.

    The key of an episode begins with the name of the generator that plays it.
    """

    def __init__(self, config: EnvironmentConfig) -> None:
        """Keep the settings; whoever comes first has the host started."""
        self._config = replace(config, workers=1)
        self._host: EnvironmentHost | None = None
        self._starting = asyncio.Lock()
        self._opening: dict[str, asyncio.Task[Answer]] = {}

    async def begin(self, generator: str) -> list[dict[str, Any]]:
        """Serve a generator that starts: what one of its name has left open is closed.

        Returns: the JSON schemas of the environment's tools.

        Raises:
            UserError: the environment cannot be used; the message says why.
            RunError: its process did not come up.
        """
        host = await self._started()
        for key in host.keys:
            if key.startswith(f"{generator}/"):
                host.close(key)
        return host.tools

    async def reset(self, key: str, task: Mapping[str, Any], seed: int) -> Answer:
        """Begin an episode, as a host does, unless it is closed meanwhile."""
        self._opening[key] = asyncio.ensure_future(self._reset(key, task, seed))
        try:
            return await self._opening[key]
        except asyncio.CancelledError:
            return EnvironmentFailure("error", f"reset: episode {key} was closed")
        finally:
            del self._opening[key]

    async def step(self, key: str, reply: Reply) -> Answer:
        """The environment's answer to a reply of the policy."""
        return _gone(key) if self._host is None else await self._host.step(key, reply)

    async def reward(self, key: str, reply: str) -> Answer:
        """What an episode is worth that a limit ends here."""
        return _gone(key) if self._host is None else await self._host.reward(key, reply)

    async def close(self, key: str) -> None:
        """End an episode, if it is there."""
        if key in self._opening:
            self._opening[key].cancel()
        if self._host is not None:
            self._host.close(key)

    async def ping(self) -> None:
        """A sign of life."""

    async def open_episodes(self) -> int:
        """Episodes that have been begun and not closed."""
        return 0 if self._host is None else self._host.open_episodes

    async def shutdown(self) -> None:
        """End every episode and the processes."""
        if self._host is not None:
            await self._host.shutdown()

    async def _reset(self, key: str, task: Mapping[str, Any], seed: int) -> Answer:
        try:
            host = await self._started()
        except (RunError, UserError) as error:  # here, where it has been started again
            return EnvironmentFailure("error", str(error))
        return await host.reset(key, task, seed)

    async def _started(self) -> EnvironmentHost:
        async with self._starting:
            if self._host is None:
                arm()
                host = EnvironmentHost(self._config)
                await host.start()
                self._host = host
            return self._host


def _gone(key: str) -> EnvironmentFailure:
    return EnvironmentFailure("error", f"episode {key} ended with the actor that it was in")
