"""The live generators and verifiers, behind two small typed classes.

A pool sends work to the member with the least of it under way. Every answer is waited
for through `Waits`, with a deadline. A member that dies is replaced, and what it was asked is asked
again; only what had been sampled of its groups is lost.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Generic, Literal, Protocol, TypeVar

import pyarrow as pa
from ray.exceptions import RayActorError

from actors.environments.worker import VerifierWorker
from actors.generation.generator import Generator
from common.supervision.calls import Call, Handle, Ref, ask, ask_pair, call, resolved, stream
from common.supervision.replacement import Replacement, is_own_death
from common.supervision.waits import Waits
from common.trajectory import GroupRequest
from common.weights.transport import Proof

if TYPE_CHECKING:
    from common.weights.transport import StoredBucket

R = TypeVar("R")


class Member(Protocol):
    """What every actor of a pool can be asked."""

    async def ping(self) -> None: ...


M = TypeVar("M", bound=Member)


class GroupLostError(Exception):
    """A group's completions died with their generator: sample it again."""


class Pool(Generic[M]):
    """Named actor handles and how many calls each has under way.

    Without a `replacement`, as until all members are up, the death of one is an error. With one, a
    member that dies leaves the pool and another is started in its place, beside the work of those
    that are left. What is asked of all waits until `min_live` are there (None: all), for as long
    as the replacement gives one to arrive.
    """

    kind = "members"
    """In the words of a stall report."""

    def __init__(
        self, handles: dict[str, Handle[M]], waits: Waits, min_live: int | None = None
    ) -> None:
        self.handles = handles
        """The members that serve now."""
        self.waits = waits
        self.replacement: Replacement[M] | None = None
        self._min_live = len(handles) if min_live is None else min_live
        self._load: Counter[str] = Counter()
        self._coming: dict[str, asyncio.Task[None]] = {}

    @contextmanager
    def least_loaded(self) -> Iterator[str]:
        """The name of the member with the least under way; one more is, inside the context."""
        name = min(self.handles, key=self._load.__getitem__)
        self._load[name] += 1
        try:
            yield name
        finally:
            self._load[name] -= 1

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
        if self.replacement is None or not is_own_death(error):
            raise error
        if self.handles.get(name) is dead:
            del self.handles[name]
            self._coming[name] = asyncio.create_task(self._replace(name, dead, error))
        await self._until_live(1)

    async def _until_live(self, count: int) -> None:
        """Returns when `count` members serve.

        Raises:
            StallError: they do not, though they had the time to arrive.
            Exception: that of one which was to come and cannot.
        """
        if len(self.handles) < count:
            assert self.replacement is not None
            await self.waits.on(
                self._arrivals(count),
                owner=self.kind,
                cause=f"{count} of them to serve ({', '.join(self._coming)} to come)",
                deadline_s=self.replacement.arrival_s,
            )

    async def _arrivals(self, count: int) -> None:
        while len(self.handles) < count:
            await asyncio.wait(self._coming.values(), return_when=asyncio.FIRST_COMPLETED)
            self._raise_failed()

    def _raise_failed(self) -> None:
        for task in self._coming.values():
            if task.done():
                task.result()

    def expect(self, names: Iterable[str]) -> None:
        """Members for which there is no room yet: each joins when there is some."""
        for name in names:
            self._coming[name] = asyncio.create_task(self._arrive(name))

    def end(self) -> None:
        """Wait for no more members."""
        for task in self._coming.values():
            task.cancel()

    async def _replace(self, name: str, dead: Handle[M], error: RayActorError) -> None:
        assert self.replacement is not None
        await self.replacement.bury(name, dead, error)
        await self._arrive(name)

    async def _arrive(self, name: str) -> None:
        assert self.replacement is not None
        while True:
            handle = await self.replacement.bring(name)
            try:
                await self._prepare(name, handle, self.replacement.deadline_s)
            except RayActorError as error:
                # It may have been put on a node of which Ray does not know yet that it is gone.
                if not is_own_death(error):
                    raise
                await self.replacement.bury(name, handle, error)
            else:
                break
        self.handles[name] = handle  # nothing was awaited since it had the newest weights
        del self._coming[name]

    async def _prepare(self, name: str, handle: Handle[M], deadline_s: float) -> None:
        """Make a new member ready to serve."""
        raise NotImplementedError


class GeneratorPool(Pool[Generator]):
    """Generators, and the weight version all of them hold."""

    kind = "generators"

    def __init__(
        self,
        handles: dict[str, Handle[Generator]],
        waits: Waits,
        version: int,
        min_live: int | None = None,
    ) -> None:
        super().__init__(handles, waits, min_live)
        self.version = version
        self._newest: tuple[list[StoredBucket], int] | None = None
        """The last update; the buckets stay in the object store for members that come later."""
        self.proof: Proof | None = None
        """Raises unless a member that comes later scores as the learner does."""

    async def start(self, deadline_s: float) -> None:
        """Start every engine."""
        await self.call_all(call(Generator.start), owner="start-up", deadline_s=deadline_s)

    async def generate(
        self, request: GroupRequest, deadline_s: float
    ) -> AsyncIterator[Ref[pa.RecordBatch]]:
        """References to rollout batches of one group, as its completions end.

        The stream says only which batch is ready; the batch is the result of a call of its own
        and stays where it was made. A reference *inside* a streamed item would not do: Ray does
        not count it, and the object may be gone before it is read (ray#58080).

        Raises:
            GroupLostError: the generator died; another is in its place.
        """
        ends = time.monotonic() + deadline_s

        async def on(waited: Awaitable[R]) -> R:
            return await self.waits.on(
                waited,
                owner=f"group {request.group_id}",
                cause=f"its completions from {name} (given {deadline_s:.0f} s in all)",
                deadline_s=ends - time.monotonic(),
            )

        await self._until_live(1)
        with self.least_loaded() as name:
            handle = self.handles[name]
            try:
                ready = stream(handle, Generator.generate_group, request)
                while (item := await on(anext(ready, None))) is not None:
                    yield ask(handle, Generator.take_batch, await on(item))
            except RayActorError as error:
                lost = error
            else:
                return
        await self.lost(name, handle, lost)
        raise GroupLostError(f"{name} died with group {request.group_id}") from lost

    async def _prepare(self, name: str, handle: Handle[Generator], deadline_s: float) -> None:
        async def answer(asked: Call[Generator, R]) -> R:
            return await self._call(name, handle, asked, "restart", deadline_s)

        await answer(call(Generator.start))
        while True:
            update = self._newest
            version = self.version
            if update is not None:
                await answer(call(Generator.update_weights, *update))
                version = update[1]
            if self.proof is not None:
                await self.proof(
                    name,
                    version,
                    lambda sequences, lengths: answer(call(Generator.score, sequences, lengths)),
                )
            if self._newest is update:  # else another version came meanwhile
                return

    async def score(
        self, sequences: list[list[int]], prompt_lengths: list[int], deadline_s: float
    ) -> dict[str, list[list[float]]]:
        """Canary scores of every generator."""
        scored = call(Generator.score, sequences, prompt_lengths)
        return await self.call_all(scored, owner="canary", deadline_s=deadline_s)

    async def sleep(self, deadline_s: float) -> None:
        """Every generator leaves its device to the learner."""
        await self.call_all(call(Generator.sleep), owner="learner", deadline_s=deadline_s)

    async def wake(self, part: Literal["weights", "cache"], deadline_s: float) -> None:
        """Memory for the next weights, then for serving again."""
        woken = call(Generator.wake_weights if part == "weights" else Generator.wake_cache)
        await self.call_all(woken, owner="publish", deadline_s=deadline_s)

    async def update_weights(
        self, buckets: list[StoredBucket], version: int, deadline_s: float
    ) -> float:
        """Bring every generator to `version`; returns the longest stall of generation, seconds."""
        self._newest = (buckets, version)
        update = call(Generator.update_weights, buckets, version)
        stalls = await self.call_all(update, owner="publish", deadline_s=deadline_s)
        return max(stalls.values())


class VerifierPool(Pool[VerifierWorker]):
    """Verifiers."""

    kind = "verifiers"

    async def warm_up(self, deadline_s: float) -> None:
        """Returns when every verifier has imported its rules."""
        await self.call_all(call(VerifierWorker.warm_up), owner="start-up", deadline_s=deadline_s)

    async def failures(self, deadline_s: float) -> Counter[str]:
        """Why rules could not judge, and how often."""
        asked = call(VerifierWorker.failures)
        found = await self.call_all(asked, owner="verdicts", deadline_s=deadline_s)
        return sum((Counter(each) for each in found.values()), Counter())

    async def score(
        self, group_id: int, rollout_ref: Ref[pa.RecordBatch], deadline_s: float
    ) -> Ref[pa.RecordBatch]:
        """Reference to the trajectory batch of a rollout batch.

        The method returns (batch, acknowledgement). Only the acknowledgement is fetched: the
        batch stays in the object store of the node that made it.

        Raises:
            GroupLostError: the completions died with their generator.
        """
        while True:
            await self._until_live(1)
            with self.least_loaded() as name:
                handle = self.handles[name]
                batch = resolved(rollout_ref)
                batch_ref, done = ask_pair(handle, VerifierWorker.score_group, batch)
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
            await self.lost(name, handle, lost)

    async def _prepare(self, name: str, handle: Handle[VerifierWorker], deadline_s: float) -> None:
        await self._call(name, handle, call(VerifierWorker.warm_up), "restart", deadline_s)
