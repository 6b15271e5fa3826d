"""A pool of actors of one kind that members leave by dying and join as others come.

A pool sends work to the member with the least of it under way. Every answer is waited for through
`Waits`, with a deadline. `actors.rollout.pools` has the pools of a run.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Generic, Protocol, Self, TypeVar

from ray.exceptions import RayActorError

from actors.rollout.loads import Loads
from common.supervision.calls import Call, Handle, call
from common.supervision.replacement import Replacement, is_own_death
from common.supervision.waits import Waits

R = TypeVar("R")
T = TypeVar("T")


class Member(Protocol):
    """What every actor of a pool can be asked."""

    async def ping(self) -> None: ...


M = TypeVar("M", bound=Member)


async def all_answer(
    handles: Mapping[str, Handle[T]], asked: Call[T, R], waits: Waits, deadline_s: float
) -> dict[str, R]:
    """Ask actors that are to form a pool, and await all; what each said, by its name.

    One that dies meanwhile is an error.
    """
    calls = [
        waits.on(
            asked.to(handle),
            owner="start-up",
            cause=f"{asked.name} of {name}",
            deadline_s=deadline_s,
        )
        for name, handle in handles.items()
    ]
    return dict(zip(handles, await asyncio.gather(*calls), strict=True))


class Pool(Generic[M]):
    """Named actors, and how many calls each has under way.

    Without a `replacement` the death of a member is an error. With one, a member that dies leaves
    the pool and another is started in its place, while the rest goes on. What is asked of all
    members waits until `min_live` are there, but no longer than a new one takes to arrive.

    A pool is a context: inside it those `to_come` join as there is room for them. At its end nobody
    joins any more.
    """

    kind = "members"
    """What a stall report calls them."""

    def __init__(
        self,
        handles: dict[str, Handle[M]],
        waits: Waits,
        replacement: Replacement[M] | None = None,
        *,
        min_live: int | None = None,
        to_come: Iterable[str] = (),
    ) -> None:
        """Take members that are up.

        Args:
            handles: changes with the members. Whoever started them ends those that are in it then.
            min_live: None stands for all of `handles`.
            to_come: names of members for which there is no room yet; these need a `replacement`.
        """
        self.handles = handles
        """The members that serve now."""
        self.waits = waits
        self._replacement = replacement
        self._min_live = len(handles) if min_live is None else min_live
        self._to_come = list(to_come)
        self._loads = Loads(handles)
        self._coming: dict[str, asyncio.Task[None]] = {}

    async def __aenter__(self) -> Self:
        for name in self._to_come:
            self._coming[name] = asyncio.create_task(self._arrive(name))
        return self

    async def __aexit__(self, kind: object, error: object, trace: object) -> None:
        for task in self._coming.values():
            task.cancel()

    @contextmanager
    def least_loaded(self) -> Iterator[str]:
        """The name of the member with the least under way; one more is, inside the context."""
        name = self._loads.least()
        self._loads.add(name, 1)
        try:
            yield name
        finally:
            self._loads.add(name, -1)

    async def call_all(
        self, asked: Call[M, R], *, owner: str, deadline_s: float, fewest: int | None = None
    ) -> dict[str, R]:
        """Ask every live member and await all answers; by name.

        Args:
            fewest: members to wait for; None stands for `min_live`.
        """
        results: dict[str, R] = {}
        while True:
            await self._until_live(self._min_live if fewest is None else fewest)
            left = [each for each in self.handles.items() if each[0] not in results]
            if not left:
                return results
            calls = [self._call(name, handle, asked, owner, deadline_s) for name, handle in left]
            # All of them, even when one fails: who tries again must not meet the rest of this.
            answers = await asyncio.gather(*calls, return_exceptions=True)
            for (name, handle), answer in zip(left, answers, strict=True):
                if isinstance(answer, RayActorError):
                    await self.lost(name, handle, answer)
                elif isinstance(answer, BaseException):
                    raise answer
                else:
                    results[name] = answer

    async def ping(self, deadline_s: float) -> None:
        """Returns when every member that serves has answered, or one in its place."""
        self._raise_failed()
        await self.call_all(call(Member.ping), owner="heartbeat", deadline_s=deadline_s, fewest=0)

    async def _call(
        self, name: str, handle: Handle[M], asked: Call[M, R], owner: str, deadline_s: float
    ) -> R:
        cause = f"{asked.name} of {name}"
        return await self.waits.on(
            asked.to(handle), owner=owner, cause=cause, deadline_s=deadline_s
        )

    async def lost(self, name: str, dead: Handle[M], error: RayActorError) -> None:
        """`dead` serves no more, another comes in its place; returns when any serves.

        Raises:
            RayActorError: the pool cannot replace it; `error`, or that of the new one.
            RunError: there were too many restarts.
        """
        if self._replacement is None or not is_own_death(error):
            raise error
        if self.handles.get(name) is dead:
            del self.handles[name]
            self._loads.leave(name)
            self._coming[name] = asyncio.create_task(self._replace(name, dead, error))
        await self._until_live(1)

    async def _until_live(self, count: int) -> None:
        """Returns when `count` members serve.

        Raises:
            StallError: they do not, though they had the time to arrive.
            Exception: that of one which was to come and cannot.
        """
        if len(self.handles) < count:
            assert self._replacement is not None
            await self.waits.on(
                self._arrivals(count),
                owner=self.kind,
                cause=f"{count} of them to serve ({', '.join(self._coming)} to come)",
                deadline_s=self._replacement.arrival_s,
            )

    async def _arrivals(self, count: int) -> None:
        while len(self.handles) < count:
            await asyncio.wait(self._coming.values(), return_when=asyncio.FIRST_COMPLETED)
            self._raise_failed()

    def _raise_failed(self) -> None:
        for task in self._coming.values():
            if task.done():
                task.result()

    async def _replace(self, name: str, dead: Handle[M], error: RayActorError) -> None:
        assert self._replacement is not None
        await self._replacement.bury(name, dead, error)
        await self._arrive(name)

    async def _arrive(self, name: str) -> None:
        assert self._replacement is not None
        while True:
            handle = await self._replacement.bring(name)
            try:
                await self._prepare(name, handle, self._replacement.deadline_s)
            except RayActorError as error:
                # It may have been put on a node of which Ray does not know yet that it is gone.
                if not is_own_death(error):
                    raise
                await self._replacement.bury(name, handle, error)
            else:
                break
        self.handles[name] = handle  # nothing was awaited since it had the newest weights
        self._loads.join(name)
        del self._coming[name]

    async def _prepare(self, name: str, handle: Handle[M], deadline_s: float) -> None:
        """Make a new member ready to serve."""
        raise NotImplementedError
