"""Generators, verifiers and the stream start again by themselves, while the others go on.

The learner does not: its ranks hold one model together, so all start again from the last checkpoint
(`deploy.restart`). Nor does a generator whose weights come by a collective (nccl, ipc).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray

from actors.pools import Revival
from deploy.cluster import ActorFactory, Actors, start_stream
from deploy.restart import Restarts
from deploy.run_dir import RunDirectory


class Reviver:
    """Makes the actors that come in the place of dead ones, and counts them."""

    def __init__(
        self,
        factory: ActorFactory,
        actors: Actors,
        run: RunDirectory,
        restarts: Restarts,
        say: Callable[[str], None],
    ) -> None:
        self._factory = factory
        self._actors = actors
        self._run = run
        self._restarts = restarts
        self._say = say

    def generators(self) -> Revival | None:
        """None where a new one could not get the weights."""
        if self._factory.config.weights.transport != "object_store":
            return None
        return self._revival(self._generator, self._factory.config.generator.start_timeout_s)

    def verifiers(self) -> Revival:
        return self._revival(self._verifier, self._factory.config.generator.start_timeout_s)

    async def stream(self, dead: Any, error: BaseException) -> Any:
        """A stream in the place of `dead`. Raises `RunError` after too many restarts."""
        pause_s = self._restarts.after(error)
        self._say(f"the trajectory stream died and starts again in {pause_s:.0f} s")
        await asyncio.sleep(pause_s)
        ray.kill(dead)  # if it only could not be reached
        return start_stream(self._factory.config, self._run.path)

    def _revival(self, make: Callable[[str], Any], deadline_s: float) -> Revival:
        return Revival(make, self._restarts.after, self._say, deadline_s)

    def _generator(self, name: str) -> Any:
        ray.kill(self._actors.generators[name])
        folder = self._factory.config.model.path
        if not Path(folder).is_dir():  # a checkpoint that has been pruned since
            newest = self._run.newest_checkpoint(self._say)
            folder = str(self._run.checkpoint(newest))
        return self._factory.generator(name, folder)

    def _verifier(self, name: str) -> Any:
        ray.kill(self._actors.verifiers[name])
        return self._factory.verifier()
