"""The live generators and verifiers, behind two small typed classes.

What a member was asked when it died is asked again, of another. Only what had been sampled of its
groups is lost: `GroupLostError`.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import pyarrow as pa
from ray.exceptions import RayActorError

from actors.generation.generator import Generator
from actors.generation.under_way import NONE, WHOLE
from actors.rollout.pool import Pool, all_answer
from actors.verifiers.worker import VerifierWorker
from common.supervision.calls import Call, Handle, Ref, ask, ask_pair, call, resolved
from common.supervision.replacement import Replacement, is_own_death
from common.supervision.waits import Waits
from common.trajectory import GroupRequest
from common.weights.transport import Proof

if TYPE_CHECKING:
    from common.weights.transport import StoredBucket

R = TypeVar("R")

_Part = tuple[Ref[pa.RecordBatch], Ref[int]]
"""A batch of a group that is to come, and the number of what is behind it."""
_On = Callable[[Awaitable[Any]], Awaitable[Any]]
"""Awaits under the deadline of a group."""


class GroupLostError(Exception):
    """A group's completions died with their generator: sample it again."""


async def start_generators(
    handles: Mapping[str, Handle[Generator]],
    waits: Waits,
    deadline_s: float,
    cache_bytes: int | None = None,
) -> None:
    """Start engines, before they form a pool. One that dies is an error.

    Args:
        cache_bytes: of the key-value cache on each CUDA device; None leaves that to vLLM.
    """
    await all_answer(handles, call(Generator.start, cache_bytes), waits, deadline_s)


async def warm_up_verifiers(
    handles: Mapping[str, Handle[VerifierWorker]], waits: Waits, deadline_s: float
) -> dict[str, list[str]]:
    """Have verifiers import their rules, before they form a pool. One that dies is an error.

    Returns: the walls that stand around each, by its name.
    """
    return await all_answer(handles, call(VerifierWorker.warm_up), waits, deadline_s)


class GeneratorPool(Pool[Generator]):
    """Generators, and the weight version all of them hold."""

    kind = "generators"

    def __init__(
        self,
        handles: dict[str, Handle[Generator]],
        waits: Waits,
        version: int,
        replacement: Replacement[Generator] | None = None,
        *,
        proof: Proof | None = None,
        min_live: int | None = None,
        to_come: Iterable[str] = (),
    ) -> None:
        """Take members that hold the weights of `version`.

        Args:
            proof: raises unless a member that comes later scores as the learner does.
        """
        super().__init__(handles, waits, replacement, min_live=min_live, to_come=to_come)
        self._version = version
        self._newest: tuple[list[StoredBucket], int] | None = None
        """The last update; the buckets stay in the object store for members that come later."""
        self._proof = proof

    @property
    def version(self) -> int:
        """The weights that every member holds."""
        return self._version

    def now_hold(self, version: int) -> None:
        """Every member has got the weights of `version`, in whatever way they came."""
        self._version = version

    async def generate(
        self, request: GroupRequest, deadline_s: float
    ) -> AsyncIterator[Ref[pa.RecordBatch]]:
        """References to rollout batches of one group, as its completions end.

        A batch is the result of a call and stays where it was made. What the coordinator fetches
        is the number beside it (`actors.generation.under_way`).

        Raises:
            GroupLostError: the generator died; another is in its place.
        """

        async def begin(handle: Handle[Generator], on: _On) -> _Part | None:
            return ask_pair(handle, Generator.generate_group, request)

        async for ref in self._batches(request, begin, deadline_s):
            yield ref

    async def follow_up(
        self,
        request: GroupRequest,
        judged: Sequence[Ref[pa.RecordBatch]],
        asked: Callable[[int], None],
        deadline_s: float,
    ) -> AsyncIterator[Ref[pa.RecordBatch]]:
        """References to rollout batches of what a group asks for after its verdicts.

        Args:
            judged: the trajectory batches of its first part.
            asked: is told how many completions these are, before any is sampled.

        Raises:
            GroupLostError: the generator died; another is in its place.
        """

        async def begin(handle: Handle[Generator], on: _On) -> _Part | None:
            batches = map(resolved, judged)
            more, number = await on(ask(handle, Generator.follow_up, request, *batches))
            asked(more)
            return ask_pair(handle, Generator.more_of, number) if more else None

        async for ref in self._batches(request, begin, deadline_s):
            yield ref

    async def _batches(
        self,
        request: GroupRequest,
        begin: Callable[[Handle[Generator], _On], Awaitable[_Part | None]],
        deadline_s: float,
    ) -> AsyncIterator[Ref[pa.RecordBatch]]:
        """The batches of what `begin` asks a member for."""
        ends = time.monotonic() + deadline_s

        async def on(waited: Awaitable[Any]) -> Any:
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
                part = await begin(handle, on)
                while part is not None:
                    batch, behind = part
                    number = await on(behind)
                    if number != NONE:
                        yield batch
                    part = ask_pair(handle, Generator.more_of, number) if number > WHOLE else None
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
            version = self._version
            if update is not None:
                await answer(call(Generator.update_weights, *update))
                version = update[1]
            if self._proof is not None:
                await self._proof(
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
