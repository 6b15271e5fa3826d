"""Checkpoints: a Hugging Face folder with the training state beside it.

    step-N/  config.json, model.safetensors, tokenizer files     compute dtype; loads as it is
             training_state/  float32 master weights and optimiser state, sharded (torch DCP)
                              trainer_state.json
            manifest.json     sizes and checksums (`common.record.manifest`)

A checkpoint is taken, a copy in memory while the learner stands still, and then written beside its
next steps: to a sibling folder, sealed, flushed to the disk and renamed, so that a folder with the
final name is complete. Any number of ranks can load what another number wrote.
"""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as load_sharded
from torch.distributed.checkpoint.state_dict_saver import save as save_sharded
from torch.optim import Optimizer

from common.errors import UserError
from common.record.manifest import seal
from common.supervision.faults import reached
from learner.policy.model import Policy, save_hf_folder
from learner.training import fsdp
from learner.training.pickles import check_metadata, plain_values_only

TRAINING_STATE = "training_state"
_TRAINER_STATE = "trainer_state.json"


@dataclass(frozen=True)
class TrainerState:
    """Training state besides the tensors of the model and its optimisers."""

    step: int
    schedule: dict[str, Any]
    """What the learning rate of the next step follows from, for the reader."""
    recipe: dict[str, Any]
    extra: dict[str, Any]
    """The caller's own state, JSON."""


@dataclass(frozen=True)
class Snapshot:
    """A checkpoint in memory: nothing in it changes when the learner steps on."""

    sharded: dict[str, Any]
    """This rank's part of the model and the optimiser's state."""
    tensors: dict[str, Tensor]
    """The whole model in compute dtype, on rank 0."""
    document: dict[str, Any]
    """`TrainerState` and every rank's random state."""


def take_snapshot(
    policy: Policy, optimizers: Sequence[Optimizer], state: TrainerState, dtype: torch.dtype
) -> Snapshot:
    """Copy all of a checkpoint into memory. Collective.

    Args:
        dtype: of the weights in the Hugging Face folder.
    """
    stepped = [optimizer for optimizer in optimizers if optimizer.state]
    stager = DefaultStager(StagingOptions(*[False] * 4))
    sharded = stager.stage(_tensors(policy, stepped))
    assert isinstance(sharded, dict)
    tensors = {}
    for name, tensor in fsdp.full_tensors(policy.model, dtype, copy=True):
        if dist.get_rank() == 0:
            tensors[name] = tensor
    generators = fsdp.gather_objects(_encode(torch.get_rng_state()))
    document = {**state.__dict__, "rng": generators, "optimizers": [_named(o) for o in optimizers]}
    return Snapshot(sharded, tensors, document)


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
        (training_state / _TRAINER_STATE).write_text(json.dumps(snapshot.document, indent=1))
        seal(partial)
        reached("checkpoint written")
        _put_in_place(partial, folder)
    dist.barrier(group)


def load_checkpoint(folder: Path, policy: Policy, optimizers: Sequence[Optimizer]) -> TrainerState:
    """Restore model, optimisers and this rank's random state; returns the rest. Collective.

    The optimisers' settings stay as they are: those of the checkpoint may have been changed since.

    Raises:
        UserError: the folder is not a checkpoint of this program, or one of other optimisers.
    """
    path = folder / TRAINING_STATE / _TRAINER_STATE
    if not path.is_file():
        raise UserError(
            f"{folder} holds no training state ({path} is missing): move the folder away to go on "
            "from an older one"
        )
    document = json.loads(path.read_text())
    stepped = _stepped(document.pop("optimizers"), optimizers, folder)
    settings = [_settings(optimizer) for optimizer in stepped]
    tensors = _tensors(policy, stepped)
    check_metadata(folder / TRAINING_STATE / ".metadata")
    with plain_values_only():
        load_sharded(tensors, checkpoint_id=str(folder / TRAINING_STATE))
    set_state_dict(
        policy.model,
        stepped,
        model_state_dict=tensors["model"],
        optim_state_dict=tensors["optimizer"],
    )
    for optimizer, groups in zip(stepped, settings, strict=True):
        for group, own in zip(optimizer.param_groups, groups, strict=True):
            group.update(own)
    generators = document.pop("rng")
    if dist.get_rank() < len(generators):
        torch.set_rng_state(_decode(generators[dist.get_rank()]))
    return TrainerState(**document)


def _tensors(policy: Policy, stepped: Sequence[Optimizer]) -> dict[str, Any]:
    """States of the model and of optimisers that have one.

    An optimiser that has not stepped yet has none, and is not asked for it: torch would make one by
    a step of its own, which counts as a step in AdamW's moments and leaves weight decay in SGD's.
    To be loaded into, such a state will do.
    """
    model, optimizer = get_state_dict(policy.model, stepped)
    return {"model": model, "optimizer": optimizer}


def _named(optimizer: Optimizer) -> dict[str, Any]:
    return {"kind": type(optimizer).__name__, "has_state": bool(optimizer.state)}


def _stepped(
    saved: list[dict[str, Any]], optimizers: Sequence[Optimizer], folder: Path
) -> list[Optimizer]:
    """The optimisers of this run whose state the checkpoint has.

    Raises:
        UserError: it was written with others.
    """
    theirs, ours = ([each["kind"] for each in saved], [type(o).__name__ for o in optimizers])
    if theirs != ours:
        raise UserError(
            f"{folder} was written with {' and '.join(theirs)}, and this run steps with "
            f"{' and '.join(ours)}: set learner.optimizer back, or begin another run from its "
            f"weights by model.path={folder}"
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
