"""Checkpoints: a Hugging Face folder with the training state beside it.

    step-N/  config.json, model.safetensors, tokenizer files     compute dtype; loads as it is
             adapter/         adapters alone, where they are trained: float32, in peft's format
             training_state/  master weights and optimiser state as they are, sharded (torch DCP)
                              trainer_state.json; the same of a critic, where there is one
             manifest.json    sizes and checksums (`common.record.manifest`)

With adapters the model is the merged one, and the training state is that of the adapters. The
frozen weights come from the folder that the run began from; a digest tells whether they are the
same.

A checkpoint is taken, a copy in memory while the learner stands still, and then written beside its
next steps: to a sibling folder, sealed, flushed to the disk and renamed, so that a folder with the
final name is complete. Any number of ranks can load what another number wrote.
"""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load as load_sharded
from torch.distributed.checkpoint.state_dict_saver import save as save_sharded
from torch.optim import Optimizer

from common.errors import UserError
from common.record.manifest import seal
from common.supervision.faults import reached
from common.weights.staging import to_host, wait_for_copies
from learner.policy.adapters import save_adapters
from learner.policy.model import Policy, save_hf_folder
from learner.training import fsdp
from learner.training.lean_adamw import LeanAdamW
from learner.training.pickles import check_metadata, plain_values_only

Trained = tuple[Policy, Sequence[Optimizer]]
"""A model that is trained, and its optimisers."""

TRAINING_STATE = "training_state"
ADAPTER = "adapter"
_TRAINER_STATE = "trainer_state.json"
_CRITIC = "critic"


@dataclass(frozen=True)
class TrainerState:
    """Training state besides the tensors of the model and its optimisers."""

    step: int
    schedule: dict[str, Any]
    """What the learning rate of the next step follows from, for the reader."""
    recipe: dict[str, Any]
    extra: dict[str, Any]
    """The caller's own state, JSON."""
    adapter: dict[str, Any] | None = None
    """What adapters there are, and the digest of the weights beside them; None where all weights
    are trained."""
    average: bool = False
    """Whether a moving average of the policy stands beside it."""


@dataclass(frozen=True)
class Snapshot:
    """A checkpoint in memory: nothing in it changes when the learner steps on."""

    sharded: dict[str, Any]
    """This rank's part of the model and the optimiser's state."""
    tensors: dict[str, Tensor]
    """The whole model in compute dtype, on rank 0."""
    adapters: dict[str, Tensor]
    """Whole adapters under peft's names, on rank 0."""
    document: dict[str, Any]
    """`TrainerState` and every rank's random state."""


def pinned_stager(device: torch.device) -> DefaultStager | None:
    """What copies a CUDA device's states to the host, checkpoint after checkpoint; else None.

    Pinned memory is slow to make and quick to fill. So it is kept, and takes each checkpoint in the
    place of the one before.
    """
    if device.type != "cuda":
        return None
    return DefaultStager(
        StagingOptions(
            use_pinned_memory=True,
            use_shared_memory=False,
            use_async_staging=False,
            use_non_blocking_copy=True,
        )
    )


def take_snapshot(
    policy: Policy,
    optimizers: Sequence[Optimizer],
    state: TrainerState,
    dtype: torch.dtype,
    stager: DefaultStager | None = None,
    critic: Trained | None = None,
    average: Mapping[str, Tensor] | None = None,
) -> Snapshot:
    """Copy all of a checkpoint into memory. Collective.

    Args:
        dtype: of the weights in the Hugging Face folder.
        stager: copies into memory that it keeps; None: into memory that goes with the snapshot.
        average: weights of a moving average of the policy.
    """
    stepped = [optimizer for optimizer in optimizers if optimizer.state]
    states = _tensors(policy, stepped)
    if critic is not None:
        states[_CRITIC] = _tensors(critic[0], [o for o in critic[1] if o.state])
    states |= _average(average)
    sharded = (stager or DefaultStager(StagingOptions(*[False] * 4))).stage(states)
    assert isinstance(sharded, dict)
    device = next(policy.model.parameters()).device
    tensors = _on_rank_zero(fsdp.full_tensors(policy, dtype, copy=device.type == "cpu"))
    adapters = _on_rank_zero(fsdp.full_adapters(policy))
    wait_for_copies(device)
    generators = fsdp.gather_objects(_encode(torch.get_rng_state()))
    document = {**state.__dict__, "rng": generators, "optimizers": [_named(o) for o in optimizers]}
    document |= {"adapter": _adapter_of(policy), "average": average is not None}
    document[_CRITIC] = None if critic is None else [_named(o) for o in critic[1]]
    return Snapshot(sharded, tensors, adapters, document)


def _on_rank_zero(tensors: Iterator[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Bring tensors to the host of rank 0, one by one; the others take part, and keep nothing."""
    kept = {}
    for name, tensor in tensors:
        if dist.get_rank() == 0:
            kept[name] = to_host(tensor)
    return kept


def write_snapshot(
    snapshot: Snapshot, folder: Path, policy: Policy, dtype: torch.dtype, group: dist.ProcessGroup
) -> None:
    """Write a checkpoint and put it in place, replacing one of the same name. Collective.

    Args:
        policy: asked for configuration and tokenizer, not for weights.
        group: all ranks, on gloo; used by nothing else, since the learner steps meanwhile.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    writer = dist.get_rank() == 0
    if writer:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier(group)
    training_state = partial / TRAINING_STATE
    save_sharded(snapshot.sharded, checkpoint_id=str(training_state), process_group=group)
    if writer:
        save_hf_folder(policy, snapshot.tensors, partial, dtype)
        if snapshot.adapters:
            save_adapters(policy, snapshot.adapters, partial / ADAPTER)
        (training_state / _TRAINER_STATE).write_text(json.dumps(snapshot.document, indent=1))
        seal(partial)
        reached("checkpoint written")
        _put_in_place(partial, folder)
    dist.barrier(group)


def load_checkpoint(
    folder: Path,
    policy: Policy,
    optimizers: Sequence[Optimizer],
    critic: Trained | None = None,
    average: Mapping[str, Tensor] | None = None,
) -> TrainerState:
    """Restore models, optimisers and this rank's random state; returns the rest. Collective.

    The optimisers' settings stay as they are: those of the checkpoint may have been changed since.
    A critic in the checkpoint is left there if none is asked for.

    Raises:
        UserError: the folder is not a checkpoint of this program, or one of other optimisers, other
            adapters or another base of them, or without the critic that is asked for.
    """
    path = folder / TRAINING_STATE / _TRAINER_STATE
    if not path.is_file():
        raise UserError(
            f"{folder} holds no training state ({path} is missing): move the folder away to go on "
            "from an older one"
        )
    document = json.loads(path.read_text())
    _check_adapter(document.get("adapter"), policy, folder)
    if average is not None and not document.get("average", False):
        raise UserError(
            f"{folder} holds no moving average of the policy, which algorithm.advantage.scorer=ema "
            "goes by: set another scorer, or begin another run from its weights by "
            f"model.path={folder}"
        )
    check_metadata(folder / TRAINING_STATE / ".metadata")
    saved, theirs = document.pop("optimizers"), document.pop(_CRITIC, None)
    _restore(policy, _stepped(saved, optimizers, folder), folder)
    if critic is not None:
        if theirs is None:
            raise UserError(
                f"{folder} was written without a critic: set algorithm.advantage.kind back, or "
                f"begin another run from its weights by model.path={folder}"
            )
        _restore(critic[0], _stepped(theirs, critic[1], folder), folder, _CRITIC)
    if average is not None:
        with plain_values_only():
            load_sharded(_average(average), checkpoint_id=str(folder / TRAINING_STATE))  # in place
    generators = document.pop("rng")
    if dist.get_rank() < len(generators):
        torch.set_rng_state(_decode(generators[dist.get_rank()]))
    return TrainerState(**document)


def _restore(
    policy: Policy, stepped: Sequence[Optimizer], folder: Path, part: str | None = None
) -> None:
    """Fill a model and those of its optimisers that have stepped; `part` is None for the policy."""
    settings = [_settings(optimizer) for optimizer in stepped]
    tensors = _tensors(policy, stepped)
    with plain_values_only():
        untrained = _load_into(tensors, folder / TRAINING_STATE, part)
    set_state_dict(
        policy.model,
        stepped,
        model_state_dict=tensors["model"],
        optim_state_dict=tensors["optimizer"],
        options=_trained(policy),
    )
    for optimizer, groups in zip(stepped, settings, strict=True):
        for name in untrained:
            optimizer.state.pop(policy.model.get_parameter(name), None)
        for group, own in zip(optimizer.param_groups, groups, strict=True):
            group.update(own)


def _load_into(tensors: dict[str, Any], folder: Path, part: str | None) -> list[str]:
    """Fill `tensors` from the sharded checkpoint; returns parameters without an optimiser's state.

    An optimiser keeps nothing of a parameter that has never had a gradient, such as the routing
    bias of some mixtures. torch makes a state for each before it loads.
    """
    saved = FileSystemReader(folder).read_metadata().state_dict_metadata
    states = tensors["optimizer"].get("state", {})
    owners = {own for key in saved for own in accumulate(key.split("."), "{}.{}".format)}
    prefix = "optimizer.state" if part is None else f"{part}.optimizer.state"
    with_state = {name for name in states if f"{prefix}.{name}" in owners}
    asked = {name: state for name, state in states.items() if name in with_state}
    wanted = {**tensors, "optimizer": {**tensors["optimizer"], "state": asked}}
    load_sharded(wanted if part is None else {part: wanted}, checkpoint_id=str(folder))
    tensors["model"] = wanted["model"]
    tensors["optimizer"] = {**wanted["optimizer"], "state": states | asked}
    return sorted(states.keys() - with_state)


def _tensors(policy: Policy, stepped: Sequence[Optimizer]) -> dict[str, Any]:
    """States of the model and of optimisers that have one.

    An optimiser that has not stepped yet has none, and is not asked for it: torch would make one by
    a step of its own, which counts as a step in AdamW's moments and leaves weight decay in SGD's.
    To be loaded into, such a state will do.
    """
    model, optimizer = get_state_dict(policy.model, stepped, options=_trained(policy))
    if policy.adapters is not None:  # a frozen weight that is tied is left under one of its names
        trained = {n for n, p in policy.model.named_parameters() if p.requires_grad}
        model = {name: value for name, value in model.items() if name in trained}
    return {"model": model, "optimizer": optimizer}


def _average(weights: Mapping[str, Tensor] | None) -> dict[str, Any]:
    """The state of a moving average: its own weights, which loading fills."""
    return {} if weights is None else {"average": dict(weights)}


def _trained(policy: Policy) -> StateDictOptions:
    """What a state is of: all parameters, or adapters without the frozen weights beside them."""
    frozen = policy.adapters is not None
    return StateDictOptions(ignore_frozen_params=frozen, strict=not frozen)


def _check_adapter(saved: dict[str, Any] | None, policy: Policy, folder: Path) -> None:
    """Raise `UserError` unless the checkpoint's adapters, or their absence, are this run's."""
    mine = _adapter_of(policy)
    if saved == mine:
        return
    again = f"or begin another run from its merged weights by model.path={folder}"
    if saved is not None and mine is not None and {**saved, "base": mine["base"]} == mine:
        raise UserError(
            f"{folder} holds adapters to other weights than those of model.path: put back the "
            f"model that the run began from, {again}"
        )
    raise UserError(
        f"{folder} was written with {_shown_adapter(saved)}, and this run has "
        f"{_shown_adapter(mine)}: set model.adapter back, {again}"
    )


def _adapter_of(policy: Policy) -> dict[str, Any] | None:
    return None if policy.adapters is None else policy.adapters.settings


def _shown_adapter(adapter: dict[str, Any] | None) -> str:
    if adapter is None:
        return "all weights trained"
    return "adapters of rank {rank}, alpha {alpha}, targets {targets}".format(**adapter)


def _named(optimizer: Optimizer) -> dict[str, Any]:
    return {"kind": _kind(optimizer), "has_state": bool(optimizer.state)}


def _kind(optimizer: Optimizer) -> str:
    """What an optimiser is, and in which form it keeps its state and its weights."""
    return optimizer.described if isinstance(optimizer, LeanAdamW) else type(optimizer).__name__


def _stepped(
    saved: list[dict[str, Any]], optimizers: Sequence[Optimizer], folder: Path
) -> list[Optimizer]:
    """The optimisers of this run whose state the checkpoint has.

    Raises:
        UserError: it was written with others.
    """
    theirs, ours = ([each["kind"] for each in saved], [_kind(each) for each in optimizers])
    if theirs != ours:
        raise UserError(
            f"{folder} was written with {' and '.join(theirs)}, and this run steps with "
            f"{' and '.join(ours)}: set learner.optimizer and learner.masters back, or begin "
            f"another run from its weights by model.path={folder}"
        )
    return [o for o, each in zip(optimizers, saved, strict=True) if each["has_state"]]


def _settings(optimizer: Optimizer) -> list[dict[str, Any]]:
    """The settings that the optimiser was made with, for every group of parameters."""
    return [
        {name: value for name, value in group.items() if name in optimizer.defaults}
        for group in optimizer.param_groups
    ]


def _put_in_place(partial: Path, folder: Path) -> None:
    """Rename; an older folder of the name steps aside first, since rename needs an empty place."""
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _encode(state: torch.Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def _decode(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
