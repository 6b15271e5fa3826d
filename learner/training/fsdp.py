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
from transformers import PreTrainedModel

from common.errors import RunError, UserError
from learner.policy.adapters import adapter_parameters, base_parameters, merge, pair_of
from learner.policy.model import Policy
from learner.policy.names import CheckpointNames
from learner.training.addresses import have_gloo_meet_at, host_address


def pick_device(choice: str, rank: int) -> torch.device:
    """The device of this rank: `auto` takes CUDA where there is some."""
    if choice == "cuda" and not torch.cuda.is_available():
        raise UserError("learner.device=cuda, but torch sees no CUDA device: use cpu or auto")
    if choice == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


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
    have_gloo_meet_at(host_address(ranks))
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
    """Shard each layer, embedding and head where they are two, and the root with what is left.

    Embedding and head apart are gathered and reduced each when its turn comes, beside the layers'
    work. As a part of the root both would be there from the first operation to the last.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=None if dtype == torch.float32 else dtype,
        reduce_dtype=torch.float32,
    )
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    for end, after_forward in _ends(model):
        fully_shard(end, mesh=mesh, mp_policy=policy, reshard_after_forward=after_forward)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    if mesh.size() == 1:  # a rank alone divides by one: with a factor given, in a copy
        return
    for module in sharded_modules(model):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # else a scaled sum, which gloo lacks


def _ends(model: nn.Module) -> list[tuple[nn.Module, bool]]:
    """Embedding and head, and whether each is freed after its forward pass; none if they are one.

    The head's backward pass follows at once.
    """
    if not isinstance(model, PreTrainedModel):  # modules that are no language model
        return []
    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    if head is None or embedding.weight is head.weight:
        return []
    return [(embedding, True), (head, False)]


def sharded_modules(model: nn.Module) -> Iterator[FSDPModule]:
    """The modules that are gathered and freed as one each."""
    return (m for m in model.modules() if isinstance(m, FSDPModule))


def gather_once(model: nn.Module, mesh: DeviceMesh) -> bool:
    """Whether parameters stay gathered through all micro-batches of a step.

    On CPUs gathering costs time and saves little memory. On GPUs memory is the reason to shard, and
    communication overlaps with compute; alone a rank only casts its weights once more.
    """
    keep = mesh.device_type == "cpu"
    if keep:
        _root(model).set_reshard_after_forward(False)
    return keep


def before_backward(
    model: nn.Module, *, last: bool, keep_gathered: bool, reduce_once: bool = False
) -> None:
    """Tell FSDP whether this micro-batch is the step's last.

    With `reduce_once` gradients are added up on every rank, and reduced in the last one alone.
    """
    root = _root(model)
    root.set_is_last_backward(last)
    if keep_gathered or reduce_once:
        root.set_requires_gradient_sync(last)
    if keep_gathered:
        root.set_reshard_after_backward(last)


def reshard(model: nn.Module) -> None:
    """Free gathered parameters, as is needed after a forward pass without backward."""
    for module in sharded_modules(model):
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
    policy: Policy, dtype: torch.dtype, *, copy: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """(name, full tensor on the model's device), one by one; tied ones once.

    All that a checkpoint of the model holds: parameters in `dtype`, adapters merged into them, then
    buffers as they are. Collective: every rank must exhaust it, and who has no use for a tensor
    lets it go. Without `copy` a tensor may be the model's own; one that nothing trains always may.
    """
    for name, parameter, layer in base_parameters(policy):
        value = _whole(parameter.detach().to(dtype, copy=copy and parameter.requires_grad))
        if layer is not None:
            a, b = (_whole(part.detach()) for part in pair_of(layer))
            value = merge(value, layer, (a, b), dtype)
        yield name, value
    for name, buffer in saved_buffers(policy.model):
        yield name, buffer.to(buffer.dtype, copy=copy)


def full_adapters(policy: Policy) -> Iterator[tuple[str, Tensor]]:
    """(name in peft's files, a full tensor's copy in float32) of all adapters. Collective."""
    for name, parameter in adapter_parameters(policy):
        yield name, _whole(parameter.detach().clone())


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this rank holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class PolicyWeights:
    """The policy's whole tensors, parameters in compute dtype, as weight transports see them."""

    def __init__(self, policy: Policy, dtype: torch.dtype) -> None:
        self._policy = policy
        self._dtype = dtype
        self._names = CheckpointNames(policy.blank(dtype))

    def shapes(self) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
        """Name, type and shape of every tensor, in the order of `tensors`."""
        parameters = [(name, each, self._dtype) for name, each, _ in base_parameters(self._policy)]
        saved = saved_buffers(self._policy.model)
        buffers = [(name, value, value.dtype) for name, value in saved]
        meta = [
            (name, torch.empty(value.shape, dtype=dtype, device="meta"))
            for name, value, dtype in parameters + buffers
        ]
        return [(name, value.dtype, tuple(value.shape)) for name, value in self._names.of(meta)]

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """See `full_tensors`; under the names that checkpoints of the architecture have."""
        return self._names.of(full_tensors(self._policy, self._dtype))


class AdapterWeights:
    """The adapters alone, whole and in float32, as weight transports see them."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy

    def shapes(self) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
        """Name, type and shape of every tensor, in the order of `tensors`."""
        found = adapter_parameters(self._policy)
        return [(name, value.dtype, tuple(value.shape)) for name, value in found]

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """See `full_adapters`."""
        return full_adapters(self._policy)


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
