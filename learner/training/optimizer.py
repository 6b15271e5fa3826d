"""The optimisers of a policy, as `learner.optimizer` names them.

Most often there is one, for all parameters. Some optimisers are for matrices alone: they get the
weight matrices inside the layers, and AdamW gets embeddings, output head, norms and biases.
AdamW in less memory is `learner.training.lean_adamw`.
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
from learner.training.lean_adamw import LeanAdamW

_KEY = "learner.optimizer"
_NAMES = names_in(get_type_hints(OptimizerConfig, include_extras=True)["kind"])
_MATRICES_ONLY: dict[str, dict[str, Any]] = {"Muon": {"adjust_lr_fn": "match_rms_adamw"}}
"""Optimisers of torch that take matrices alone, with what makes AdamW's learning rate theirs."""
MASTERS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""Types of the weights that are trained, as `learner.masters` names them."""


def make_optimizers(
    config: LearnerConfig, model: nn.Module, layers: Iterable[nn.Module], *, seed: int = 0
) -> list[Optimizer]:
    """Optimisers that have every parameter of `model` that is trained between them.

    Args:
        layers: the model's, whose matrices an optimiser of matrices gets.
        seed: of stochastic rounding.

    Raises:
        UserError: there is no such optimiser, or it does not take its arguments.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if _lean(config):
        return [_lean_adamw(config, parameters, seed)]
    if not _shared(config.optimizer):
        return [_make(config, parameters)]
    inside = {id(p) for layer in layers for p in layer.parameters() if p.ndim == 2}
    matrices = _make(config, [p for p in parameters if id(p) in inside])
    others = [p for p in parameters if id(p) not in inside]  # none, where adapters are trained
    return [matrices, _adamw(config, others, {})] if others else [matrices]


def set_rate(optimizers: Sequence[Optimizer], rate: float) -> None:
    """Have every optimiser step at the learning rate `rate` from now on."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate


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


def _lean(config: LearnerConfig) -> bool:
    """Whether AdamW is the one that takes less memory; `common.config.checks` holds it to AdamW."""
    return config.optimizer.state != "float32" or config.masters != "float32"


def _lean_adamw(config: LearnerConfig, parameters: Sequence[Parameter], seed: int) -> Optimizer:
    return LeanAdamW(
        parameters,
        config.learning_rate,
        config.betas,
        config.weight_decay,
        state_8bit=config.optimizer.state == "8bit",
        seed=seed,
        **config.optimizer.args,
    )


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
        model, optimizers = _tried(config, 4)
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


def state_bytes(config: LearnerConfig, adapter_rank: int = 0) -> float:
    """Bytes that the optimiser keeps for a parameter, measured on two matrices.

    Where two optimisers share the parameters, it is those of the one that keeps more.

    Args:
        adapter_rank: that of adapters, whose matrices are long and narrow; 0 for a layer's.
    """
    _, optimizers = _tried(config, 256, adapter_rank)
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


def _tried(
    config: LearnerConfig, size: int, adapter_rank: int = 0
) -> tuple[nn.Module, list[Optimizer]]:
    """A model of one layer and as much outside of it, after two steps; or the A and B of one."""
    inner = adapter_rank or size
    with torch.random.fork_rng(devices=[]):
        layer = nn.Linear(inner, size, bias=not adapter_rank)
        outside = nn.Linear(size, inner, bias=not adapter_rank)
    model = nn.Sequential(outside, layer).to(MASTERS[config.masters])
    optimizers = make_optimizers(config, model, [layer])
    if all("lr" in group for each in optimizers for group in each.param_groups):
        set_rate(optimizers, config.learning_rate)  # as a number, as a run does
    for _ in range(2):
        for parameter in model.parameters():
            made_up = torch.linspace(-1, 1, parameter.numel(), dtype=parameter.dtype)
            parameter.grad = made_up.reshape(parameter.shape)
        for optimizer in optimizers:
            optimizer.step()
    return model, optimizers
