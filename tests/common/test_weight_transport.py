"""Weight transports: their facts, and both halves of the way through the object store."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any, get_args

import msgspec
import numpy as np
import pytest
import torch

from common.config.sections import Config
from common.errors import WeightsError
from common.weights.buckets import WeightBucket, unpack_tensors
from common.weights.lending import buffer_at
from common.weights.object_store import ObjectStore
from common.weights.registry import TRANSPORTS, TransportName, names_where
from common.weights.transport import Receivers, SendingRank, Shipment

TENSORS = {
    "a": torch.arange(5.0),
    "b": torch.randn(300, 7).to(torch.bfloat16),
    "bias": torch.tensor(3.5),
    "c": torch.arange(6).reshape(1, 2, 3),
}


class Weights:
    """What a rank has; counts how far it was gathered."""

    def __init__(self) -> None:
        self.gathered = 0

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        for pair in TENSORS.items():
            self.gathered += 1
            yield pair


class Worker:
    """vLLM's worker: it gets what msgpack makes of an update, and loads it."""

    def __init__(self, in_process: bool) -> None:
        self.in_process = in_process
        self.loaded: dict[str, torch.Tensor] = {}
        self.version = -1

    async def update(self, update_infos: list[dict[str, Any]], version: int) -> float:
        for info in update_infos:
            bucket = WeightBucket(**msgspec.msgpack.decode(msgspec.msgpack.encode(info)))
            tensors = unpack_tensors(bucket, buffer_at(bucket.buffer))
            self.loaded |= {name: tensor.clone() for name, tensor in tensors}
        self.version = version
        return 0.25


async def stored(buffer: Any) -> Any:
    return buffer


def sent_by(rank: int, weights: Weights) -> Shipment:
    """What a rank sends, in buckets of one KiB; the store keeps the very buffer."""
    sending = SendingRank(rank, weights, 1024, stored, lambda: ("", 0))  # type: ignore[arg-type]
    return ObjectStore().open(sending, Receivers([], 1, 1.0)).send(7)


@pytest.mark.parametrize("in_process", [True, False])
def test_the_worker_loads_what_the_learner_sent(in_process: bool) -> None:
    sent, worker = sent_by(0, Weights()), Worker(in_process)
    assert len(sent.buckets) > 1
    assert sent.nbytes >= sum(tensor.nbytes for tensor in TENSORS.values())
    assert asyncio.run(ObjectStore().receive(worker, sent.buckets, 7)) == 0.25
    assert worker.version == 7
    assert worker.loaded.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert worker.loaded[name].dtype == tensor.dtype
        assert torch.equal(worker.loaded[name], tensor)


def test_other_ranks_take_part_in_the_gathering_and_send_nothing() -> None:
    weights = Weights()
    assert sent_by(1, weights) == Shipment(0)
    assert weights.gathered == len(TENSORS)


def test_of_a_damaged_update_nothing_is_loaded() -> None:
    """vLLM would skip the layers it had begun with when the update is sent again."""

    async def damaged(buffer: Any) -> Any:
        return np.roll(await buffer, 1)

    sent, worker = sent_by(0, Weights()), Worker(True)
    *whole, last = sent.buckets
    buckets: Any = [*whole, last.at(damaged(last.buffer))]
    with pytest.raises(WeightsError, match="arrived damaged"):
        asyncio.run(ObjectStore().receive(worker, buckets, 7))
    assert not worker.loaded


def test_every_name_has_a_transport_with_facts_that_agree() -> None:
    assert tuple(TRANSPORTS) == get_args(TransportName)
    assert Config().transport is TRANSPORTS["object_store"]
    assert names_where(lambda transport: not transport.needs_cuda) == "object_store"
    for transport in TRANSPORTS.values():
        assert not (transport.one_collective and transport.survives_a_death)
