"""Weights from device to device by vLLM's own transports: `nccl` across GPUs, `ipc` on one.

Every rank of the learner takes part, since gathering a shard is a collective. Rank 0 sends, and
drives the generators through vLLM's update protocol.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from common.errors import UserError
from common.supervision.calls import Call, ask, call, get_all
from common.weights.transport import (
    Receivers,
    SendingRank,
    Shipment,
    Sides,
    WeightReceiver,
    WeightTransport,
)

if TYPE_CHECKING:
    import torch
    from vllm.distributed.weight_transfer.base import TrainerInitInfo, WeightSource

R = TypeVar("R")


class DeviceToDevice(WeightTransport):
    """What vLLM's own transports have in common: the export brings generators up to date too."""

    needs_cuda = True
    one_collective = True
    survives_a_death = False

    def open(self, rank: SendingRank, receivers: Receivers) -> DeviceSender:
        import torch

        if not torch.cuda.is_available():
            raise UserError(
                f"weights.transport={self.name} needs CUDA: use weights.transport=object_store"
            )
        workers = len(receivers.handles) * receivers.workers_each
        return DeviceSender(self._init_info(rank, workers), rank, receivers)

    @abstractmethod
    def _init_info(self, rank: SendingRank, workers: int) -> TrainerInitInfo:
        """vLLM's settings of the learner's end, for `workers` processes of all generators."""


class Nccl(DeviceToDevice):
    """Broadcast over NCCL from the learner's rank 0 to every worker."""

    name = "nccl"
    shares_devices = False

    def _init_info(self, rank: SendingRank, workers: int) -> TrainerInitInfo:
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

        host, port = rank.agree_on_address()
        return NCCLTrainerInitInfo(
            master_address=host, master_port=port, world_size=1 + workers, rank=rank.rank
        )


class Ipc(DeviceToDevice):
    """CUDA's handles of memory on the same device, which learner and generator use in turns."""

    name = "ipc"
    shares_devices = True

    def _init_info(self, rank: SendingRank, workers: int) -> TrainerInitInfo:
        from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

        return IPCTrainerInitInfo(packed=True, rank=rank.rank)

    async def make_room(self, sides: Sides) -> None:
        await sides.generators.sleep(sides.deadline_s)

    async def export(self, sides: Sides, version: int) -> Shipment:
        """The cache comes last: until the weights are over, the device holds both copies."""
        learner, generators, deadline_s = sides.learner, sides.generators, sides.deadline_s
        await learner.release_memory(deadline_s)
        await generators.wake("weights", deadline_s)
        sent = await learner.export_weights(version)
        await learner.release_memory(deadline_s)
        await generators.wake("cache", deadline_s)
        return sent


class DeviceSender:
    """A rank's end of the transport."""

    def __init__(self, init_info: TrainerInitInfo, rank: SendingRank, receivers: Receivers) -> None:
        from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

        self._client = GeneratorClient(receivers)
        self._bytes = sum(
            dtype.itemsize * math.prod(shape) for _, dtype, shape in rank.weights.shapes()
        )
        self._engine = WeightTransferTrainerFactory.trainer_init(
            init_info, client=self._client, source=_source(rank)
        )

    def send(self, version: int) -> Shipment:
        """Bring every generator to `version`."""
        self._client.version = version
        self._engine.send_weights()
        return Shipment(self._bytes, stall_s=self._client.stall_s)


class GeneratorClient:
    """vLLM's control plane of an update over the generators' actors, each call with a deadline."""

    def __init__(self, receivers: Receivers) -> None:
        self._receivers = receivers
        self.version = 0
        self.stall_s = 0.0

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Give the workers of each generator ranks of their own behind the learner's rank 0."""
        calls = []
        for index, handle in enumerate(self._receivers.handles):
            info = dict(init_info)
            if "rank_offset" in info:
                info["rank_offset"] += index * self._receivers.workers_each
            calls.append(ask(handle, WeightReceiver.init_weight_transfer, info))
        get_all(calls, self._receivers.deadline_s)

    def start_weight_update(self) -> None:
        self._all(call(WeightReceiver.begin_update))

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self._all(call(WeightReceiver.receive_weights, update_info))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """`weight_version` is vLLM's to give; ours is set before every send."""
        self.stall_s = max(self._all(call(WeightReceiver.end_update, self.version)))

    def _all(self, asked: Call[WeightReceiver, R]) -> list[R]:
        answers = [asked.to(handle) for handle in self._receivers.handles]
        return get_all(answers, self._receivers.deadline_s)


def _source(rank: SendingRank) -> WeightSource:
    """The rank's weights as vLLM asks for them."""
    from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource

    class Source(WeightSource):
        def metadata(self) -> list[ParamMeta]:
            return [ParamMeta(*facts) for facts in rank.weights.shapes()]

        def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
            return rank.weights.tensors(rank.device)

    return Source()
