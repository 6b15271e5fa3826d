"""Weights from device to device by vLLM's own transports: `nccl` across GPUs, `ipc` on one.

Every learner rank takes part (gathering a shard is a collective); rank 0 sends, and drives the
generators through vLLM's update protocol. This is the one module of the learner that knows vLLM,
and it is imported only when one of these transports is configured.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from vllm.distributed.weight_transfer.base import ParamMeta, TrainerInitInfo, WeightSource
from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

from common.errors import UserError
from common.supervision.calls import Call, Handle, ask, call, get_all
from common.weight_transport import WeightReceiver
from learner.training import fsdp

R = TypeVar("R")


class GeneratorClient:
    """vLLM's weight-sync control plane over generator actors, with a deadline on every call.

    `workers_each`: processes of a generator that take part.
    """

    def __init__(
        self, handles: list[Handle[WeightReceiver]], workers_each: int, deadline_s: float
    ) -> None:
        self._handles = handles
        self._workers_each = workers_each
        self._deadline_s = deadline_s
        self.version = 0
        self.stall_s = 0.0

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Each generator's workers get ranks of their own behind the learner's rank 0."""
        calls = []
        for index, handle in enumerate(self._handles):
            info = dict(init_info)
            if "rank_offset" in info:
                info["rank_offset"] += index * self._workers_each
            calls.append(ask(handle, WeightReceiver.init_weight_transfer, info))
        get_all(calls, self._deadline_s)

    def start_weight_update(self) -> None:
        self._all(call(WeightReceiver.begin_update))

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self._all(call(WeightReceiver.receive_weights, update_info))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """`weight_version` is vLLM's to give; ours is set before every send."""
        self.stall_s = max(self._all(call(WeightReceiver.end_update, self.version)))

    def _all(self, asked: Call[WeightReceiver, R]) -> list[R]:
        return get_all([asked.to(handle) for handle in self._handles], self._deadline_s)


class PolicySource(WeightSource):
    """The policy's full tensors, parameters in compute dtype; iterating is a collective."""

    def __init__(self, model: torch.nn.Module, dtype: torch.dtype, device: torch.device) -> None:
        self._model = model
        self._dtype = dtype
        self._device = device

    def metadata(self) -> list[ParamMeta]:
        return [
            ParamMeta(name, self._dtype, tuple(parameter.shape))
            for name, parameter in self._model.named_parameters()
        ] + [
            ParamMeta(name, buffer.dtype, tuple(buffer.shape))
            for name, buffer in fsdp.saved_buffers(self._model)
        ]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return iter(fsdp.full_tensors(self._model, self._dtype, self._device))


class DeviceTransport:
    """One rank's end of the transport. Construct on every rank at the same time."""

    def __init__(
        self,
        backend: str,
        model: torch.nn.Module,
        dtype: torch.dtype,
        device: torch.device,
        rank: int,
        address: tuple[str, int],
        client: GeneratorClient,
        num_workers: int,
    ) -> None:
        if not torch.cuda.is_available():
            raise UserError(
                f"weights.transport={backend} needs CUDA: use weights.transport=object_store"
            )
        self._client = client
        source = PolicySource(model, dtype, device)
        self._bytes = sum(meta.dtype.itemsize * math.prod(meta.shape) for meta in source.metadata())
        self._engine = WeightTransferTrainerFactory.trainer_init(
            _init_info(backend, rank, address, num_workers), client=client, source=source
        )

    def send(self, version: int) -> tuple[float, int]:
        """Bring every generator to `version`: (seconds generation stood still, bytes sent)."""
        self._client.version = version
        self._engine.send_weights()
        return self._client.stall_s, self._bytes


def _init_info(
    backend: str, rank: int, address: tuple[str, int], num_workers: int
) -> TrainerInitInfo:
    if backend == "nccl":
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

        host, port = address
        return NCCLTrainerInitInfo(
            master_address=host, master_port=port, world_size=1 + num_workers, rank=rank
        )
    from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

    return IPCTrainerInitInfo(packed=True, rank=rank)
