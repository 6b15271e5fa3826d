"""A new actor in the place of one that died: a generator, a verifier or the log's writer."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from ray.exceptions import RayActorError, RayTaskError

from common.errors import first_line
from common.supervision.calls import Handle

T = TypeVar("T")


async def _at_once(name: str) -> None:
    """Return at once: there always is room."""


@dataclass(frozen=True)
class Replacement(Generic[T]):
    """How actors of one kind are replaced."""

    make: Callable[[str], Handle[T]]
    """Starts an actor for a name."""
    allow: Callable[[BaseException], float]
    """Seconds to wait before the restart that answers an error; raises after too many."""
    notify: Callable[[str], None]
    """Told of every death."""
    deadline_s: float
    """Seconds that the new actor has to start."""
    room: Callable[[str], Awaitable[None]] = _at_once
    """Returns when the cluster has room for the actor of a name."""
    room_s: float = 0.0
    """Seconds that the cluster has to find room, where the run cannot go on without the actor."""

    @property
    def arrival_s(self) -> float:
        """Seconds within which a new actor must serve, where the run cannot go on without it.

        They cover room and start, and around them the pause, the weights and their proof.
        """
        return self.room_s + 2 * self.deadline_s

    async def bury(self, name: str, dead: Handle[T], error: RayActorError) -> None:
        """End `dead` for good, after the pause that its `error` calls for.

        Raises:
            RunError: there were too many restarts.
        """
        pause_s = self.allow(error)
        self.notify(f"{name} died and starts again in {pause_s:.0f} s: {first_line(error)}")
        await asyncio.sleep(pause_s)
        dead.kill()  # if it only could not be reached

    async def replace(self, name: str, dead: Handle[T], error: RayActorError) -> Handle[T]:
        """Bury `dead` and bring a new actor for its name."""
        await self.bury(name, dead, error)
        return await self.bring(name)

    async def bring(self, name: str) -> Handle[T]:
        """Start a new actor, once there is room for it."""
        await self.room(name)
        return self.make(name)


def is_own_death(error: RayActorError) -> bool:
    """Whether the called actor itself died; else an argument was lost with another one."""
    return not isinstance(error, RayTaskError)
