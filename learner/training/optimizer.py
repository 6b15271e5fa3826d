"""The optimisers of a policy, as `learner.optimizer` names them.

Most often there is one, for all parameters. Some optimisers are for matrices alone: they get the
weight matrices inside the layers, and AdamW gets embeddings, output head, norms and biases.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, get_type_hints

import torch
from torch import nn
from torch.nn import Parameter
from torch.optim import Optimizer

from common.config.names import import_named, names_in
from common.config.sections import LearnerConfig, OptimizerConfig
from common.errors import UserError

_KEY = "learner.optimizer"
_NAMES = names_in(get_type_hints(OptimizerConfig, include_extras=True)["kind"])
_MATRICES_ONLY: dict[str, dict[str, Any]] = {"Muon": {"adjust_lr_fn": "match_rms_adamw"}}
"""Optimisers of torch that take matrices alone, with what makes AdamW's learning rate theirs."""


def make_optimizers(
    config: LearnerConfig, model: nn.Module, layers: Iterable[nn.Module]
) -> list[Optimizer]:
    """Optimisers that have every parameter of `model` between them.

    Args:
        layers: the model's, whose matrices an optimiser of matrices gets.

    Raises:
        UserError: there is no such optimiser, or it does not take its arguments.
    """
    parameters = list(model.parameters())
    if not _shared(config.optimizer):
        return [_make(config, parameters)]
    inside = {id(p) for layer in layers for p in layer.parameters() if p.ndim == 2}
    return [
        _make(config, [p for p in parameters if id(p) in inside]),
        _adamw(config, [p for p in parameters if id(p) not in inside], {}),
    ]


def _shared(config: OptimizerConfig) -> bool:
    return config.matrices_only or config.kind in _MATRICES_ONLY


def _make(config: LearnerConfig, parameters: Sequence[Parameter]) -> Optimizer:
    kind, args = config.optimizer.kind, dict(config.optimizer.args)
    if kind == "AdamW":
        return _adamw(config, parameters, args)
    made = _class(kind)(parameters, lr=config.learning_rate, **_MATRICES_ONLY.get(kind, {}) | args)
    if not isinstance(made, Optimizer):
        raise UserError(
            f"{_KEY}.kind={kind} made a {type(made).__name__}: name a torch.optim.Optimizer"
        )
    return made


def _adamw(
    config: LearnerConfig, parameters: Sequence[Parameter], args: dict[str, Any]
) -> Optimizer:
    settings: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": config.betas,
        "weight_decay": config.weight_decay,
        "fused": True,
    }
    return torch.optim.AdamW(parameters, **settings | args)


def _class(kind: str) -> Callable[..., object]:
    if kind not in _NAMES:
        found: Callable[..., object] = import_named(f"{_KEY}.kind", kind, _NAMES)
        return found
    ours: Callable[..., object] | None = getattr(torch.optim, kind, None)
    if ours is None:
        raise UserError(f"{_KEY}.kind={kind}: torch {torch.__version__} does not have it")
    return ours


def check_optimizer(config: LearnerConfig) -> None:
    """Take two steps with made-up gradients, so that what cannot work is found before a run.

    Raises:
        UserError: the optimiser cannot be imported, does not take its arguments, fails, or does
            not leave finite numbers; or AdamW's settings are given to another.
    """
    _check_settings(config)
    try:
        model, optimizers = _tried(config, size=4)
        for optimizer in optimizers:
            optimizer.load_state_dict(optimizer.state_dict())
    except UserError:
        raise
    except Exception as error:  # an optimiser is a program of the user's; it may raise anything
        raise UserError(
            f"{_KEY}.kind={config.optimizer.kind} with args={config.optimizer.args} raised "
            f"{type(error).__name__}: {error}. It is made as Class(parameters, lr=..., **args)"
        ) from error
    if not all(bool(p.isfinite().all()) for p in model.parameters()):
        raise UserError(f"{_KEY}.kind={config.optimizer.kind} makes steps that are not finite")
    if not all("lr" in group for each in optimizers for group in each.param_groups):
        raise UserError(
            f"{_KEY}.kind={config.optimizer.kind} keeps no lr in its param_groups, where "
            "learner.schedule and learner.warmup_steps set it"
        )


def _check_settings(config: LearnerConfig) -> None:
    args, kind = config.optimizer.args, config.optimizer.kind
    if "lr" in args:
        raise UserError(f"{_KEY}.args has an lr: set learner.learning_rate")
    if kind == "AdamW":
        for name in ("betas", "weight_decay"):
            if name in args:
                raise UserError(f"{_KEY}.args has {name}: set learner.{name}")
    elif not _shared(config.optimizer):
        default = LearnerConfig()
        for name in ("betas", "weight_decay"):
            if getattr(config, name) != getattr(default, name):
                raise UserError(
                    f"learner.{name} is AdamW's: for {_KEY}.kind={kind} put {name} into "
                    f"{_KEY}.args, where the class takes it"
                )


def state_bytes(config: LearnerConfig) -> float:
    """Bytes that the optimiser keeps for a parameter, measured on two square matrices.

    Where two optimisers share the parameters, it is those of the one that keeps more.
    """
    _, optimizers = _tried(config, size=256)
    return max(_kept(each) for each in optimizers)


def _kept(optimizer: Optimizer) -> float:
    """Bytes a parameter, without counters: those do not grow with the parameter."""
    parameters = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    tensors = [
        value
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor) and value.ndim
    ]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors) / parameters


def _tried(config: LearnerConfig, size: int) -> tuple[nn.Module, list[Optimizer]]:
    """A model of one layer and as much outside of it, after two steps."""
    with torch.random.fork_rng(devices=[]):
        layer, outside = nn.Linear(size, size), nn.Linear(size, size)
    model = nn.Sequential(outside, layer)
    optimizers = make_optimizers(config, model, [layer])
    for _ in range(2):
        for parameter in model.parameters():
            parameter.grad = torch.linspace(-1, 1, parameter.numel()).reshape(parameter.shape)
        for optimizer in optimizers:
            optimizer.step()
    return model, optimizers
