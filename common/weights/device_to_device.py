"""Weights from device to device by vLLM's own transports: `nccl` across GPUs, `ipc` on one.

Every rank of the learner takes part, since gathering a shard is a collective. Rank 0 sends, and
drives the generators through vLLM's update protocol.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

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
    from torch import Tensor
    from vllm.distributed.weight_transfer.base import TrainerInitInfo, WeightSource

R = TypeVar("R")

_PACK_BYTES = 256 * 2**20
"""Smallest buffer through which `ipc` sends; larger ones take more memory and are no faster."""


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
        # In vLLM 0.32 the receiver loads each of two buffers on a stream of its own. A fused layer
        # whose tensors lie in both is read before the other stream has filled it. With one buffer
        # there is one stream; 0.33 waits for the other.
        buffers = {} if _is_from_033() else {"packed_num_buffers": 1}
        return NCCLTrainerInitInfo(
            master_address=host, master_port=port, world_size=1 + workers, rank=rank.rank, **buffers
        )


class Ipc(DeviceToDevice):
    """CUDA's handles of memory on the same device, which learner and generator use in turns."""

    name = "ipc"
    shares_devices = True
    # The handles hold types of torch, which vLLM passes to its engine's process by pickle alone.
    generator_environment: ClassVar = {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}

    def _init_info(self, rank: SendingRank, workers: int) -> TrainerInitInfo:
        from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

        largest = max(_nbytes(dtype, shape) for _, dtype, shape in rank.weights.shapes())
        return IPCTrainerInitInfo(
            packed=True, packed_buffer_size_bytes=max(_PACK_BYTES, largest), rank=rank.rank
        )

    async def make_room(self, sides: Sides) -> None:
        await sides.generators.sleep(sides.deadline_s)

    async def export(self, sides: Sides, version: int) -> Shipment:
        await sides.learner.release_memory(sides.deadline_s)
        await sides.generators.wake("weights", sides.deadline_s)
        return await sides.learner.export_weights(version)

    async def serve_again(self, sides: Sides) -> None:
        """The cache comes last: until now the device held buffers and a pass of the learner."""
        await sides.learner.release_memory(sides.deadline_s)
        await sides.generators.wake("cache", sides.deadline_s)


class DeviceSender:
    """A rank's end of the transport."""

    def __init__(self, init_info: TrainerInitInfo, rank: SendingRank, receivers: Receivers) -> None:
        from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

        self._client = GeneratorClient(receivers)
        self._bytes = sum(_nbytes(dtype, shape) for _, dtype, shape in rank.weights.shapes())
        self._engine = WeightTransferTrainerFactory.trainer_init(
            init_info, client=self._client, source=_source(rank)
        )

    def send(self, version: int) -> Shipment:
        """Bring every generator to `version`."""
        import torch

        self._client.version = version
        # vLLM gathers and packs on streams of its own, which do not wait for the optimiser's.
        torch.cuda.current_stream().synchronize()
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


def _nbytes(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    return dtype.itemsize * math.prod(shape)


def _is_from_033() -> bool:
    """Whether vLLM's interface of weight sources is that of 0.33, else that of 0.32."""
    from vllm.distributed.weight_transfer.base import WeightSource

    return hasattr(WeightSource, "iter_full")


def _source(rank: SendingRank) -> WeightSource:
    """The rank's weights as vLLM asks for them, in the words of the version that is installed."""
    from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource

    def facts() -> list[ParamMeta]:
        return [ParamMeta(*each) for each in rank.weights.shapes()]

    def tensors() -> Iterator[tuple[str, Tensor]]:
        return rank.weights.tensors()

    if _is_from_033():

        class Source033(WeightSource):
            @cached_property
            def metadata(self) -> list[ParamMeta]:
                return facts()

            def iter_full(self) -> Iterator[tuple[str, Tensor]]:
                return tensors()

        return Source033()

    class Source032(WeightSource):
        def metadata(self) -> list[ParamMeta]:
            return facts()

        def __iter__(self) -> Iterator[tuple[str, Tensor]]:
            return tensors()

    return Source032()
