"""Process group and FSDP2 sharding of the learner.

Master weights are float32 shards; a layer is gathered in compute dtype for its forward and
backward pass, and gradients are reduced in float32. Gradients are *summed* over ranks: the loss
already has its one global denominator.
"""

from __future__ import annotations

import random
import socket
from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import TCPStore
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from common.errors import RunError, UserError


def pick_device(choice: str, rank: int) -> torch.device:
    """The device of this rank: `auto` takes CUDA where there is some."""
    if choice == "cuda" and not torch.cuda.is_available():
        raise UserError("learner.device=cuda, but torch sees no CUDA device: use cpu or auto")
    if choice == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def host_address(ranks: int) -> str:
    """An address of this host that the other ranks can reach."""
    if ranks == 1:
        return "127.0.0.1"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing: only asks for the route
        except OSError:  # no route at all: a host without a network
            return "127.0.0.1"
        return str(probe.getsockname()[0])


def free_address(ranks: int) -> tuple[str, int]:
    """This host and a port nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return host_address(ranks), probe.getsockname()[1]


def serve_rendezvous(ranks: int, timeout_s: float) -> tuple[TCPStore, str, int]:
    """Rank 0's store, already listening, with the address the others connect to."""
    host = host_address(ranks)
    # The store by itself would listen on every interface, and it asks nobody for a password.
    with socket.create_server((host, 0)) as listening:
        port = listening.getsockname()[1]
        store = TCPStore(
            host,
            port,
            ranks,
            True,
            timedelta(seconds=timeout_s),
            wait_for_workers=False,
            master_listen_fd=listening.detach(),
        )
    return store, host, port


def connect_rendezvous(host: str, port: int, ranks: int, timeout_s: float) -> TCPStore:
    """The store that rank 0 serves."""
    return TCPStore(host, port, ranks, False, timedelta(seconds=timeout_s))


def join_process_group(
    store: TCPStore, device: torch.device, rank: int, ranks: int, timeout_s: float
) -> None:
    """Join the default process group; every collective has `timeout_s` as its deadline."""
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=store,
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=timeout_s),
    )


def writing_group(timeout_s: float) -> dist.ProcessGroup:
    """All ranks once more, on gloo, for what they do beside their steps. Collective."""
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
    assert isinstance(group, dist.ProcessGroup)
    return group


def data_mesh(device: torch.device, shard_ranks: int | None) -> DeviceMesh:
    """All ranks, as rows of `shard_ranks` that shard one copy of the weights; None: one row."""
    ranks = dist.get_world_size()
    if shard_ranks is None or shard_ranks == ranks:
        return init_device_mesh(device.type, (ranks,))
    shape = (ranks // shard_ranks, shard_ranks)
    return init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))


def shard(
    model: nn.Module, layers: Iterable[nn.Module], mesh: DeviceMesh, dtype: torch.dtype
) -> None:
    """Shard each layer, then the root with what is left, in place."""
    policy = MixedPrecisionPolicy(
        param_dtype=None if dtype == torch.float32 else dtype,
        reduce_dtype=torch.float32,
    )
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    if mesh.size() == 1:  # a rank alone divides by one: with a factor given, in a copy
        return
    for module in _sharded_modules(model):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # else a scaled sum, which gloo lacks


def _sharded_modules(model: nn.Module) -> Iterator[FSDPModule]:
    return (m for m in model.modules() if isinstance(m, FSDPModule))


def gather_once(model: nn.Module, mesh: DeviceMesh) -> bool:
    """Whether parameters stay gathered through all micro-batches of a step.

    Alone, or on CPUs, gathering costs time and saves little memory; across GPUs the sharded
    memory is the reason to shard, and communication overlaps with compute.
    """
    keep = mesh.size() == 1 or mesh.device_type == "cpu"
    if keep:
        _root(model).set_reshard_after_forward(False)
    return keep


def before_backward(model: nn.Module, *, last: bool, keep_gathered: bool) -> None:
    """Tell FSDP whether this micro-batch is the step's last."""
    root = _root(model)
    root.set_is_last_backward(last)
    if keep_gathered:
        root.set_requires_gradient_sync(last)
        root.set_reshard_after_backward(last)


def reshard(model: nn.Module) -> None:
    """Free gathered parameters, as is needed after a forward pass without backward."""
    for module in _sharded_modules(model):
        module.reshard()


def _root(model: nn.Module) -> FSDPModule:
    assert isinstance(model, FSDPModule)
    return model


def shard_from_rank_zero(
    model: nn.Module, layers: Iterable[nn.Module], mesh: DeviceMesh, dtype: torch.dtype
) -> None:
    """Shard a model whose parameters only rank 0 has read, and hand the shards out. Collective.

    One full tensor at a time exists beside the shards. Buffers that checkpoints hold go with them,
    whole; those that follow from the configuration are each rank's own.

    Raises:
        RunError: the ranks built different models; their collectives would wait for ever.
    """
    shapes = gather_objects([(n, tuple(p.shape)) for n, p in model.named_parameters()])
    for rank, other in enumerate(shapes):
        if other != shapes[0]:
            odd = sorted({name for name, _ in set(other) ^ set(shapes[0])}) or ["their order"]
            raise RunError(
                f"learner ranks 0 and {rank} hold different models: {', '.join(odd[:5])}"
            )
    source = model.named_parameters() if mesh.get_rank() == 0 else ()
    whole = {name: parameter.detach() for name, parameter in source}
    shard(model, layers, mesh, dtype)
    if mesh.size() == 1:
        return
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor)
        full = torch.empty(parameter.shape, dtype=parameter.dtype, device=mesh.device_type)
        if whole:
            full.copy_(whole.pop(name))
        with torch.no_grad():
            parameter.copy_(distribute_tensor(full, mesh, parameter.placements, src_data_rank=0))
    for _, buffer in saved_buffers(model):
        dist.broadcast(buffer, src=0)


def saved_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Buffers that are part of a checkpoint, as the routing bias of some mixtures of experts.

    Nothing trains them. Left out, loaders would take zeros in their place and say nothing.
    """
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield f"{prefix}.{name}" if prefix else name, buffer


def full_tensors(
    model: nn.Module,
    dtype: torch.dtype,
    device: torch.device | None = None,
    *,
    copy: bool = False,
) -> Iterator[tuple[str, Tensor]]:
    """(name, full tensor on `device`, the CPU if None), one by one; tied ones once.

    All that a checkpoint of the model holds: parameters in `dtype`, then buffers as they are.
    Collective: every rank must exhaust it. Without `copy` a tensor may be the model's own.
    """
    for name, parameter in model.named_parameters():
        value = parameter.detach().to(dtype, copy=copy)
        if isinstance(value, DTensor):
            value = value.full_tensor()
        yield name, value.to(device or "cpu")
    for name, buffer in saved_buffers(model):
        yield name, buffer.to(device or "cpu", copy=copy)


class PolicyWeights:
    """The policy's whole tensors, parameters in compute dtype, as weight transports see them."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        self._model = model
        self._dtype = dtype

    def shapes(self) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
        """Name, type and shape of every tensor, in the order of `tensors`."""
        parameters = self._model.named_parameters()
        return [(name, self._dtype, tuple(value.shape)) for name, value in parameters] + [
            (name, value.dtype, tuple(value.shape)) for name, value in saved_buffers(self._model)
        ]

    def tensors(self, device: torch.device | None = None) -> Iterator[tuple[str, Tensor]]:
        """See `full_tensors`."""
        return full_tensors(self._model, self._dtype, device)


def clip_gradients(model: nn.Module, max_norm: float) -> float:
    """Scale gradients to a global norm of at most `max_norm`; returns the norm before."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    return float(norm)


def gather_objects(value: Any) -> list[Any]:
    """`value` of every rank, in rank order, on every rank."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
