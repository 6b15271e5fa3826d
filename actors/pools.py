"""The live generators and verifiers, behind two small typed classes.

A pool sends work to the member with the least of it under way. Handles are Ray actors; every
call goes through `Waits` with a deadline.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

from common.trajectory import GroupRequest
from common.waits import Waits
from common.weights import WeightBucket


class Pool:
    """Named actor handles and how many calls each has under way."""

    def __init__(self, handles: dict[str, Any], waits: Waits) -> None:
        self.handles = handles
        self.waits = waits
        self._load = dict.fromkeys(handles, 0)

    @contextmanager
    def least_loaded(self) -> Iterator[str]:
        """The name of the member with the least under way; one more is, inside the context."""
        name = min(self._load, key=self._load.__getitem__)
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
            self.waits.on(
                getattr(handle, method).remote(*args),
                owner=owner,
                cause=f"{method} of {name}",
                deadline_s=deadline_s,
            )
            for name, handle in self.handles.items()
        ]
        return dict(zip(self.handles, await asyncio.gather(*calls), strict=True))


class GeneratorPool(Pool):
    """Generators, and the weight version all of them hold."""

    def __init__(self, handles: dict[str, Any], waits: Waits, version: int) -> None:
        super().__init__(handles, waits)
        self.version = version

    async def generate(self, request: GroupRequest, deadline_s: float) -> AsyncIterator[Any]:
        """References to rollout batches of one group, as its completions end.

        The stream says only which batch is ready; the batch is the result of a call of its own
        and stays where it was made. A reference *inside* a streamed item would not do: Ray does
        not count it, and the object may be gone before it is read (ray#58080).
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
            ready = handle.generate_group.options(num_returns="streaming").remote(request)
            while (item := await on(anext(ready, None))) is not None:
                yield handle.take_batch.remote(await on(item))

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
        """
        with self.least_loaded() as name:
            method = self.handles[name].score_group
            batch_ref, done = method.options(num_returns=2).remote(rollout_ref)
            await self.waits.on(
                done,
                owner=f"group {group_id}",
                cause=f"its verdicts from {name}",
                deadline_s=deadline_s,
            )
            return batch_ref
