"""Weights through Ray's object store: the learner puts buckets into it, generators take them out.

It runs everywhere. The buckets of the newest version stay in the store, so a generator that comes
later takes them from there. The worker's part of it is `actors.generation.weight_engine`.
"""

from __future__ import annotations

import asyncio
from contextlib import ExitStack
from typing import TYPE_CHECKING

from common.supervision.faults import reached
from common.weights.transport import (
    Receivers,
    SendingRank,
    Shipment,
    Sides,
    WeightLoader,
    WeightTransport,
)

if TYPE_CHECKING:
    from common.weights.transport import StoredBucket


class ObjectStore(WeightTransport):
    """Buckets with checksums, checked as a whole before the first is loaded."""

    name = "object_store"
    needs_cuda = False
    shares_devices = False
    one_collective = False
    survives_a_death = True
    carries_adapters = True

    def open(self, rank: SendingRank, receivers: Receivers) -> BucketSender:
        return BucketSender(rank)

    async def receive(
        self, engine: WeightLoader, buckets: list[StoredBucket], version: int
    ) -> float:
        import numpy as np

        from common.weights.buckets import check_bucket
        from common.weights.lending import lend

        buffers = await asyncio.gather(*[bucket.buffer for bucket in buckets])
        if reached("weights received"):
            buffers[-1] = np.roll(buffers[-1], 1)
        for bucket, buffer in zip(buckets, buffers, strict=True):
            await asyncio.to_thread(check_bucket, bucket, buffer)
        with ExitStack() as loans:
            places = [
                loans.enter_context(await asyncio.to_thread(lend, buffer, engine.in_process))
                for buffer in buffers
            ]
            updates = [
                vars(bucket.at(place)) for bucket, place in zip(buckets, places, strict=True)
            ]
            return await engine.update(updates, version)

    async def deliver(self, sides: Sides, shipment: Shipment, version: int) -> float:
        return await sides.generators.update_weights(shipment.buckets, version, sides.deadline_s)


class BucketSender:
    """A rank's end: rank 0 packs and stores, the others only take part in the gathering."""

    def __init__(self, rank: SendingRank) -> None:
        self._rank = rank

    def send(self, version: int) -> Shipment:
        """Store the weights in compute dtype; tied ones once, under the embedding's name."""
        from common.weights.buckets import pack_tensors

        tensors = self._rank.weights.tensors()
        if self._rank.rank != 0:
            for _ in tensors:
                pass
            return Shipment(0)
        buckets = [
            bucket.at(self._rank.put(bucket.buffer))
            for bucket in pack_tensors(tensors, self._rank.bucket_bytes)
        ]
        return Shipment(sum(bucket.nbytes for bucket in buckets), buckets)
