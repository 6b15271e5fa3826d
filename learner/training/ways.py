"""How a rank computes its steps: what it settles at set-up, where the configuration leaves it open.

    recompute, reduce_once   what the device's free memory allows (`learner.training.memory`)
    offload                  as `learner.activation_offload` says; it comes with recompute
    compiled                 on CUDA, where there is a C compiler for Triton
    attention                the variable-length kernel, where it gives the numbers of the grids

All ranks settle on the same. Whatever is left out is said in the first lines of a run.
"""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from common.config.sections import LearnerConfig
from common.errors import UserError
from learner.policy.adapters import adapter_parameters, base_parameters
from learner.policy.attention import ATTENTION_NAME
from learner.policy.model import Policy, checkpoint_activations, varlen_fault
from learner.policy.offload import offload_inputs
from learner.policy.shape import ModelShape, shape_of_config
from learner.policy.varlen import VARLEN_DEVICES
from learner.training import fsdp
from learner.training.memory import (
    NCCL,
    SLACK,
    LearnerLoad,
    OtherModels,
    fitting,
    learner_memory,
)
from learner.training.optimizer import MASTERS, state_bytes


@dataclass(frozen=True)
class Ways:
    """How the layers and the head of a policy are computed."""

    recompute: bool
    reduce_once: bool
    compiled: bool
    notes: tuple[str, ...] = ()
    offload: bool = False
    """Whether what is kept for `recompute` waits on the host."""

    def apply(self, policy: Policy, *, trainable: bool) -> None:
        """Prepare a policy that is not sharded yet."""
        if self.compiled:
            compile_layers(policy.layers)
            policy.head.use_compiled()
        if trainable and self.recompute:
            checkpoint_activations(policy.layers)
            if self.offload:
                offload_inputs(policy.layers)


def compile_layers(layers: nn.ModuleList) -> None:
    """Compile each layer's forward pass, but for its attention.

    `forward` itself, so that FSDP's hooks run outside, and a layer that is computed again is
    compiled inside of that: around it nothing would be.
    """
    for layer in layers:
        layer.forward = torch.compile(layer.forward, dynamic=True)


def settle(
    config: LearnerConfig,
    policy: Policy,
    device: torch.device,
    tokens: int,
    others: OtherModels,
) -> Ways:
    """Settle how to compute, before the policy is on its device. Collective.

    Args:
        tokens: those of the longest micro-batch.
        others: what the rank holds beside the policy.

    Raises:
        UserError: activations cannot leave a device that is none.
    """
    if device.type != "cuda":
        check_offload(config)
        return Ways(bool(config.activation_checkpointing), False, bool(config.compile))
    load = LearnerLoad(
        shards=config.shard_ranks or config.ranks,
        tokens=tokens,
        logits_mib=config.logits_mib,
        recompute=True,
        state_bytes=state_bytes(config, policy.adapters.config.rank if policy.adapters else 0),
        others=others,
        adapters=sum(parameter.numel() for _, parameter in adapter_parameters(policy)),
        master=MASTERS[config.masters].itemsize,
        offload=config.activation_offload,
    )
    compiled, notes = _compiles(config)
    free, total = torch.cuda.mem_get_info(device)
    room = free - SLACK * total - (NCCL if config.ranks > 1 else 0.0)
    shape = shape_of(policy)
    if shape is None:
        recompute = config.activation_checkpointing is not False
        load = replace(load, recompute=recompute, reduce_once=bool(config.reduce_once))
    else:
        load = fitting(shape, load, room, config.activation_checkpointing, config.reduce_once)
        needed = learner_memory(shape, load).peak
        if needed > room:
            notes = (
                *notes,
                f"a step needs {needed / 1e9:.1f} GB by plan and {room / 1e9:.1f} GB are free: "
                "lower batch.tokens_per_microbatch if it runs out of memory",
            )
    mine = Ways(load.recompute, load.reduce_once, compiled, notes, config.activation_offload)
    return _agreed(fsdp.gather_objects(mine))


def _agreed(ways: Sequence[Ways]) -> Ways:
    """What every rank can do."""
    return Ways(
        any(way.recompute for way in ways),
        all(way.reduce_once for way in ways),
        all(way.compiled for way in ways),
        tuple(dict.fromkeys(note for way in ways for note in way.notes)),
        ways[0].offload,
    )


def check_offload(config: LearnerConfig) -> None:
    """Raise `UserError` where the activations of a learner on CPUs shall leave its device."""
    if config.activation_offload:
        raise UserError(
            "learner.activation_offload=true moves activations off a CUDA device until they are "
            "needed, and this learner is on CPUs, where they are in the host's memory anyway: set "
            "it to false"
        )


def _compiles(config: LearnerConfig) -> tuple[bool, tuple[str, ...]]:
    """Whether to compile on CUDA, and what to say if not."""
    if config.compile is not None:
        return config.compile, ()
    compilers = (os.environ.get("CC", "cc"), "gcc", "clang")
    if any(shutil.which(name) for name in compilers):
        return True, ()
    return False, (
        f"no C compiler on {socket.gethostname()}: layers and head are not compiled, which makes "
        "steps slower. Install gcc (apt-get install gcc)",
    )


def shape_of(policy: Policy) -> ModelShape | None:
    """The shape of a policy's model; None where it is none that `ModelShape` describes."""
    try:
        shape = shape_of_config(policy.pristine_config.to_dict())
    except (KeyError, TypeError):
        return None
    parameters = sum(parameter.numel() for _, parameter, _ in base_parameters(policy))
    return shape if abs(shape.parameters / parameters - 1) < _ALIKE else None


_ALIKE = 0.02
"""Share by which the parameters of a shape may differ from those of its model."""


def settle_attention(
    choice: str, policy: Policy, device: torch.device, dtype: torch.dtype, temperature: float
) -> tuple[str, ...]:
    """Take the attention that `learner.attention` names, and what to say of it. Collective.

    Raises:
        UserError: `varlen` was asked for by name, and does not do here.
    """
    possible = device.type in VARLEN_DEVICES and dtype == torch.bfloat16
    if choice == "grids" or (choice == "auto" and not possible):
        return ()
    found = fsdp.gather_objects(varlen_fault(policy, device, temperature))
    faults = [fault for fault in found if fault is not None]
    if not faults:
        return ("attention: the variable-length kernel, which gave the numbers of the grids",)
    if choice == "varlen":
        raise UserError(f"{faults[0]}: use learner.attention=grids")
    policy.model.config._attn_implementation = ATTENTION_NAME
    return (f"attention: padded grids, since {faults[0]}",)
