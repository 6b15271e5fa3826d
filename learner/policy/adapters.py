"""Adapters (LoRA): pairs of small matrices beside frozen weights, which are trained in their place.

    W x + alpha / rank * B (A x)        A: [rank, in], random; B: [out, rank], zero at first

peft makes the layers. They are made before the policy is sharded. The frozen weights may then go
over to compute dtype; A and B stay float32. What is published is W + alpha / rank * B A, under the
name of W. So a forward pass with adapters must give what one with merged weights gives. That is
tried at every start, once for each kind of layer.

The same model with its adapters off is the one that the run began from: `WithoutAdapters`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import xxhash
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.modules.conv import _ConvNd
from transformers.pytorch_utils import Conv1D

from common.config.data import ALL_LINEAR
from common.errors import UserError, nearest
from learner.policy.logprobs import LogprobHead
from learner.policy.model import Policy
from learner.policy.self_check import check_row

if TYPE_CHECKING:
    from common.config.sections import AdapterConfig

_KEY = "model.adapter"
_NAME = "default"
"""What peft calls an adapter that is the only one."""
_TOLERANCE = 2e-3
"""Nats a token in float32 between adapters and merged weights. Rounding stays below 1e-4."""
_TRIED = 0.5
"""Size of the change by which they are compared, as a share of a weight's own spread."""


@dataclass(frozen=True)
class Adapters:
    """The adapters of a policy."""

    config: AdapterConfig
    base: str
    """Digest of the weights beside which they stand, as they were read; "" on ranks that read
    none."""
    written: Any
    """Configuration of peft, as it goes into adapter_config.json."""

    @property
    def settings(self) -> dict[str, Any]:
        """What a checkpoint must agree on, JSON."""
        return {**asdict(self.config), "base": self.base}


def add_adapters(policy: Policy, config: AdapterConfig, *, seed: int, weights: bool) -> None:
    """Give the policy adapters, prove them and freeze the rest.

    Args:
        policy: in float32, on the CPU, not sharded.
        weights: whether its weights were read here; elsewhere only shapes count.

    Raises:
        UserError: a target takes no adapter, or the model computes otherwise with merged weights.
    """
    from peft import LoraConfig
    from peft.mapping import inject_adapter_in_model

    model = policy.model
    targets = _targets(policy, config.targets)
    base = _digest(model) if weights else ""
    made = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        target_modules=targets,
        fan_in_fan_out=isinstance(model.get_submodule(targets[0]), Conv1D),
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(made, model)
    policy.adapters = Adapters(config, base, made)
    if weights:
        _check(policy)


def adapted(policy: Policy) -> Iterator[tuple[str, Any]]:
    """(name of the layer, layer of peft) of all that have an adapter."""
    if policy.adapters is None:
        return
    for name, module in policy.model.named_modules():
        if hasattr(module, "lora_A"):
            yield name, module


def base_parameters(policy: Policy) -> Iterator[tuple[str, Parameter, Any]]:
    """(name without adapters, parameter, layer of peft that changes it or None), in order."""
    layers = {id(layer.base_layer.weight): layer for _, layer in adapted(policy)}
    added = {id(parameter) for layer in layers.values() for parameter in pair_of(layer)}
    for name, parameter in policy.model.named_parameters():
        if id(parameter) not in added:
            plain = name.replace(".base_layer.", ".") if layers else name
            yield plain, parameter, layers.get(id(parameter))


def adapter_parameters(policy: Policy) -> Iterator[tuple[str, Parameter]]:
    """(name in peft's files, parameter) of all adapters."""
    for name, layer in adapted(policy):
        for part, parameter in zip(("lora_A", "lora_B"), pair_of(layer), strict=True):
            yield f"base_model.model.{name}.{part}.weight", parameter


def merge(weight: Tensor, layer: Any, pair: tuple[Tensor, Tensor], dtype: torch.dtype) -> Tensor:
    """The weight of `layer` with its adapter, added in float32 and cast once.

    Args:
        pair: A and B, whole, float32.
    """
    a, b = pair
    if not bool(b.any()):  # not even the sign of a zero changes
        return weight.to(dtype)
    if layer.fan_in_fan_out:
        a, b = b.T, a.T
    scale = layer.scaling[_NAME]
    return torch.addmm(weight.float(), b, a, alpha=scale).to(dtype)


def pair_of(layer: Any) -> tuple[Parameter, Parameter]:
    """A and B of a layer of peft."""
    return layer.lora_A[_NAME].weight, layer.lora_B[_NAME].weight


class WithoutAdapters(Policy):
    """A policy with its adapters off, which shares all weights with the policy it is made from."""

    def __init__(self, policy: Policy) -> None:
        vars(self).update(vars(policy))

    def logprobs(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        with _off([layer for _, layer in adapted(self)]):
            return super().logprobs(*args, **kwargs)


@contextmanager
def _off(layers: list[Any]) -> Iterator[None]:
    """Turn adapters off. peft's own switch would also freeze them, under FSDP for good."""
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def save_adapters(policy: Policy, tensors: dict[str, Tensor], folder: Path) -> None:
    """Write adapters into `folder`, as peft and vLLM read them."""
    assert policy.adapters is not None
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    policy.adapters.written.save_pretrained(str(folder))


def _targets(policy: Policy, wanted: str) -> list[str]:
    """Full names of the layers that get an adapter.

    Raises:
        UserError: one of those that are wanted takes none.
    """
    model = policy.model
    linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)]
    if not linear:
        raise UserError(
            f"{type(model).__name__} has no linear layer that takes an adapter: {_KEY}.rank=0 "
            "trains all weights"
        )
    experts = [name for name, module in model.named_modules() if _holds_experts(module)]
    if wanted == ALL_LINEAR:
        if experts:
            raise UserError(
                f"{_KEY}.targets={ALL_LINEAR}: the experts of this model are one tensor a layer "
                f"({experts[0]}), which takes no adapter. Name the layers that shall have one: "
                f"{_KEY}.targets={','.join(_ends(linear))}"
            )
        return linear
    found = []
    for target in (part.strip() for part in wanted.split(",")):
        matching = [name for name in linear if name == target or name.endswith(f".{target}")]
        if not matching:
            raise UserError(f"{_KEY}.targets: {_why_not(policy, target, _ends(linear))}")
        found += matching
    return list(dict.fromkeys(found))


def _why_not(policy: Policy, target: str, ends: list[str]) -> str:
    """Why a module takes no adapter, and which do."""
    choices = f"use {ALL_LINEAR}, or some of {', '.join(ends)}"
    for name, module in policy.model.named_modules():
        if name != target and not name.endswith(f".{target}"):
            continue
        if isinstance(module, LogprobHead | nn.Embedding):
            tied = policy.model.get_input_embeddings().weight is policy.head.weight
            what = "the output head" if isinstance(module, LogprobHead) else "the embedding"
            why = ", and tied: an adapter would change embedding and head at once" if tied else ""
            return f"{target} is {what}{why}. It stays frozen: {choices}"
        if _holds_experts(module):
            return f"{target} holds experts as one tensor, which takes no adapter: {choices}"
    return f"{target} is no linear layer of this model{nearest(target, ends)}: {choices}"


def _holds_experts(module: nn.Module) -> bool:
    """Whether a module has the matrices of several experts as one tensor."""
    own = module.parameters(recurse=False)
    return not isinstance(module, _ConvNd) and any(parameter.ndim > 2 for parameter in own)


def _ends(names: list[str]) -> list[str]:
    """The last parts of the names, each once."""
    return list(dict.fromkeys(name.rpartition(".")[2] for name in names))


def _digest(model: nn.Module) -> str:
    """XXH3 of all weights, by name and shape."""
    digest = xxhash.xxh3_128()
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)};".encode())
        digest.update(parameter.detach().contiguous().view(-1).numpy().data)
    return digest.hexdigest()


@torch.no_grad()
def _check(policy: Policy) -> None:
    """Raise `UserError` unless adapters compute what merged weights do.

    One layer of each kind is tried, so that little memory is taken. An architecture may read a
    weight without asking its layer: then the adapter has no part in the forward pass.
    """
    kinds = {re.sub(r"\d+", "#", name): layer for name, layer in adapted(policy)}
    row = check_row(policy.model)
    random = torch.Generator().manual_seed(0)
    for layer in kinds.values():
        a, b = pair_of(layer)
        spread = float(layer.base_layer.weight.std()) / float(a.std() * a.shape[0] ** 0.5)
        b.normal_(0.0, _TRIED * spread / layer.scaling[_NAME], generator=random)
    beside_N, _ = policy.logprobs(row, temperature=1.0)
    kept = [layer.base_layer.weight.data for layer in kinds.values()]
    for layer in kinds.values():
        weight = layer.base_layer.weight
        weight.data = merge(weight.data, layer, pair_of(layer), weight.dtype)
        pair_of(layer)[1].zero_()
    merged_N, _ = policy.logprobs(row, temperature=1.0)
    for layer, weight in zip(kinds.values(), kept, strict=True):
        layer.base_layer.weight.data = weight
    gap = float((beside_N - merged_N).abs().max())
    if not gap <= _TOLERANCE:
        raise UserError(
            f"with adapters {type(policy.model).__name__} computes otherwise than with merged "
            f"weights, by {gap:.3g} nats (tolerance {_TOLERANCE}): it does not ask all of the "
            f"layers {', '.join(_ends(list(kinds)))} for their products. Name others in "
            f"{_KEY}.targets, or train all weights ({_KEY}.rank=0)"
        )
