"""The live generators and verifiers, behind two small typed classes.

A pool sends work to the member with the least of it under way. Handles are Ray actors; every
call goes through `Waits` with a deadline. A member that dies is replaced, and what it was asked is
asked again; only what had been sampled of its groups is lost.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

from ray.exceptions import RayActorError

from common.revival import Revival, is_own_death
from common.trajectory import GroupRequest
from common.waits import Waits
from common.weights import Proof, WeightBucket


class GroupLostError(Exception):
    """A group's completions died with their generator: sample it again."""


class Pool:
    """Named actor handles and how many calls each has under way.

    Without a `revival`, as until all members are up, the death of one is an error.
    """

    def __init__(self, handles: dict[str, Any], waits: Waits) -> None:
        self.handles = handles
        self.waits = waits
        self._load = dict.fromkeys(handles, 0)
        self.revival: Revival | None = None
        self._reviving = asyncio.Lock()
        self._down: set[str] = set()

    @contextmanager
    def least_loaded(self) -> Iterator[str]:
        """The name of the member with the least under way; one more is, inside the context."""
        up = [name for name in self._load if name not in self._down]
        name = min(up or self._load, key=self._load.__getitem__)
        self._load[name] += 1
        try:
            yield name
        finally:
            self._load[name] -= 1

    async def call_all(
        self, method: str, *args: Any, owner: str, deadline_s: float
    ) -> dict[str, Any]:
        """Call `method` on every member and await all; results by name."""
        calls = [
            self._call(name, method, *args, owner=owner, deadline_s=deadline_s)
            for name in self.handles
        ]
        # All of them, even when one fails: who tries again must not meet the rest of this.
        results = await asyncio.gather(*calls, return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result
        return dict(zip(self.handles, results, strict=True))

    async def ping(self, deadline_s: float) -> None:
        """Returns when every member has answered, or one in its place."""
        await self.call_all("ping", owner="heartbeat", deadline_s=deadline_s)

    async def _call(self, name: str, method: str, *args: Any, owner: str, deadline_s: float) -> Any:
        """Call one member, or the one that comes in its place."""
        while True:
            handle = self.handles[name]
            try:
                return await self._call_once(handle, name, method, args, owner, deadline_s)
            except RayActorError as error:
                await self.revive(name, handle, error)

    async def _call_once(
        self,
        handle: Any,
        name: str,
        method: str,
        args: tuple[Any, ...],
        owner: str,
        deadline_s: float,
    ) -> Any:
        return await self.waits.on(
            getattr(handle, method).remote(*args),
            owner=owner,
            cause=f"{method} of {name}",
            deadline_s=deadline_s,
        )

    async def revive(self, name: str, dead: Any, error: RayActorError) -> None:
        """Put a new actor in the place of `dead`, unless that has been done.

        Raises:
            RayActorError: the pool cannot; `error`, or that of the new one.
            RunError: there were too many restarts.
        """
        if self.revival is None or not is_own_death(error):
            raise error
        self._down.add(name)
        async with self._reviving:
            if self.handles[name] is not dead:
                return
            handle = await self.revival.replace(name, dead, error)
            await self._prepare(name, handle, self.revival.deadline_s)
            self.handles[name] = handle
            self._down.discard(name)

    async def _prepare(self, name: str, handle: Any, deadline_s: float) -> None:
        """Make a new member ready to serve."""
        raise NotImplementedError


class GeneratorPool(Pool):
    """Generators, and the weight version all of them hold."""

    def __init__(self, handles: dict[str, Any], waits: Waits, version: int) -> None:
        super().__init__(handles, waits)
        self.version = version
        self._newest: tuple[list[WeightBucket], int] | None = None
        """The last update; the buckets stay in the object store for members that come later."""
        self.proof: Proof | None = None
        """Raises unless a member that comes later scores as the learner does."""

    async def generate(self, request: GroupRequest, deadline_s: float) -> AsyncIterator[Any]:
        """References to rollout batches of one group, as its completions end.

        The stream says only which batch is ready; the batch is the result of a call of its own
        and stays where it was made. A reference *inside* a streamed item would not do: Ray does
        not count it, and the object may be gone before it is read (ray#58080).

        Raises:
            GroupLostError: the generator died; another is in its place.
        """
        ends = time.monotonic() + deadline_s

        def on(waited: Any) -> Any:
            return self.waits.on(
                waited,
                owner=f"group {request.group_id}",
                cause=f"its completions from {name} (given {deadline_s:.0f} s in all)",
                deadline_s=ends - time.monotonic(),
            )

        with self.least_loaded() as name:
            handle = self.handles[name]
            try:
                ready = handle.generate_group.options(num_returns="streaming").remote(request)
                while (item := await on(anext(ready, None))) is not None:
                    yield handle.take_batch.remote(await on(item))
            except RayActorError as error:
                lost = error
            else:
                return
        await self.revive(name, handle, lost)
        raise GroupLostError(f"{name} died with group {request.group_id}") from lost

    async def _prepare(self, name: str, handle: Any, deadline_s: float) -> None:
        await self._call_once(handle, name, "start", (), "restart", deadline_s)
        if self._newest is not None:
            await self._call_once(
                handle, name, "update_weights", self._newest, "restart", deadline_s
            )
        if self.proof is not None:
            version = self._newest[1] if self._newest else self.version
            await self.proof(
                name,
                version,
                lambda sequences, lengths: self._call_once(
                    handle, name, "score", (sequences, lengths), "restart", deadline_s
                ),
            )

    async def score(
        self, sequences: list[list[int]], prompt_lengths: list[int], deadline_s: float
    ) -> dict[str, list[list[float]]]:
        """Canary scores of every generator."""
        return await self.call_all(
            "score", sequences, prompt_lengths, owner="canary", deadline_s=deadline_s
        )

    async def update_weights(
        self, buckets: list[WeightBucket], version: int, deadline_s: float
    ) -> float:
        """Bring every generator to `version`; returns the longest stall of generation, seconds."""
        self._newest = (buckets, version)
        stalls = await self.call_all(
            "update_weights", buckets, version, owner="publish", deadline_s=deadline_s
        )
        return float(max(stalls.values()))


class VerifierPool(Pool):
    """Verifiers."""

    async def failures(self, deadline_s: float) -> Counter[str]:
        """Why rules could not judge, and how often."""
        found = await self.call_all("failures", owner="verdicts", deadline_s=deadline_s)
        return sum((Counter(each) for each in found.values()), Counter())

    async def score(self, group_id: int, rollout_ref: Any, deadline_s: float) -> Any:
        """Reference to the trajectory batch of a rollout batch.

        The method returns (batch, acknowledgement). Only the acknowledgement is fetched: the
        batch stays in the object store of the node that made it.

        Raises:
            GroupLostError: the completions died with their generator.
        """
        while True:
            with self.least_loaded() as name:
                handle = self.handles[name]
                batch_ref, done = handle.score_group.options(num_returns=2).remote(rollout_ref)
                try:
                    await self.waits.on(
                        done,
                        owner=f"group {group_id}",
                        cause=f"its verdicts from {name}",
                        deadline_s=deadline_s,
                    )
                except RayActorError as error:
                    if not is_own_death(error):
                        raise GroupLostError(f"completions of group {group_id}") from error
                    lost = error
                else:
                    return batch_ref
            await self.revive(name, handle, lost)

    async def _prepare(self, name: str, handle: Any, deadline_s: float) -> None:
        await self._call_once(handle, name, "warm_up", (), "restart", deadline_s)
