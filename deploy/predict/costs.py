"""Costs of a run's parts on GPUs, from data sheets: the input of `deploy.predict.simulate`.

Nothing here was measured on these devices. Peaks and bandwidths are the makers' figures; the
shares of them that software reaches are assumptions, listed in `Assumptions` and printed by `plan`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import UserError
from deploy.predict.simulate import Costs

_BYTES = 2
"""Bytes of a weight or a cached key in bfloat16."""
_MASTER_BYTES = 8
"""Bytes of a parameter in the learner: float32 weights and gradients, without the optimiser."""


@dataclass(frozen=True)
class Device:
    """Peaks of one accelerator: dense bfloat16 FLOP/s, memory bytes/s, memory in bytes."""

    flops: float
    bandwidth: float
    memory: float


DEVICES = {
    "A100-80GB": Device(312e12, 2.0e12, 80e9),
    "H100-80GB": Device(989e12, 3.35e12, 80e9),
    "H200-141GB": Device(989e12, 4.8e12, 141e9),
    "L40S-48GB": Device(362e12, 0.864e12, 48e9),
}


@dataclass(frozen=True)
class Assumptions:
    """Shares of the peaks that software reaches, and what no data sheet says."""

    learner_utilisation: float = 0.40
    prefill_utilisation: float = 0.50
    decode_bandwidth: float = 0.70
    decode_utilisation: float = 0.30
    round_overhead_s: float = 2e-3
    """Seconds for scheduling, sampling and kernel launches of a decoding round."""
    all_reduce_s: float = 20e-6
    """Seconds of an all-reduce; tensor parallelism has two a layer."""
    network: float = 40e9
    """Bytes/s between nodes, into each generator at once (broadcast)."""
    request_s: float = 1e-4
    coordinate_s: float = 0.0055
    """Seconds a group, measured on cores slower than a cluster's, as
    `tests/bench/results/scaling.md` has it."""
    verify_s: float = 0.02
    log_group_s: float = 2e-3
    step_overhead_s: float = 0.5


@dataclass(frozen=True)
class ModelShape:
    """A decoder with grouped-query attention and a gated MLP."""

    vocabulary: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    intermediate: int
    tied: bool
    attention_bias: bool = False

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        attention = self.hidden * self.head_size * (2 * self.heads + 2 * self.kv_heads)
        if self.attention_bias:
            attention += self.head_size * (self.heads + 2 * self.kv_heads)
        layer = attention + 3 * self.hidden * self.intermediate + 2 * self.hidden
        embeddings = self.vocabulary * self.hidden * (1 if self.tied else 2)
        return self.layers * layer + embeddings + self.hidden

    @property
    def kv_bytes(self) -> int:
        """Bytes of one token in the key-value cache."""
        return 2 * self.layers * self.kv_heads * self.head_size * _BYTES


MODELS = {
    "Qwen/Qwen2.5-1.5B": ModelShape(151_936, 1536, 28, 12, 2, 128, 8960, True, True),
    "Qwen/Qwen2.5-3B": ModelShape(151_936, 2048, 36, 16, 2, 128, 11_008, True, True),
    "Qwen/Qwen2.5-7B": ModelShape(152_064, 3584, 28, 28, 4, 128, 18_944, False, True),
    "meta-llama/Llama-3.1-8B": ModelShape(128_256, 4096, 32, 32, 8, 128, 14_336, False),
}
"""Shapes of models that a plan should not have to download, by name without `-Instruct`."""


def model_shape(path: str) -> ModelShape:
    """The shape of a model, by a known name or from a Hugging Face folder.

    Raises: `UserError` for any other.
    """
    known = MODELS.get(path.removesuffix("-Instruct"))
    if known is not None:
        return known
    config = Path(path) / "config.json"
    if not config.is_file():
        raise UserError(
            f"model.path={path}: its shape is not known here. Give a local folder, or one of "
            f"{', '.join(sorted(MODELS))}"
        )
    return _read_shape(json.loads(config.read_text()))


def _read_shape(config: dict[str, Any]) -> ModelShape:
    """Read a shape from config.json; a multimodal model keeps its language model's apart."""
    config = config | config.get("text_config", {})
    heads = config["num_attention_heads"]
    return ModelShape(
        vocabulary=config["vocab_size"],
        hidden=config["hidden_size"],
        layers=config["num_hidden_layers"],
        heads=heads,
        kv_heads=config.get("num_key_value_heads", heads),
        head_size=config.get("head_dim") or config["hidden_size"] // heads,
        intermediate=config["intermediate_size"],
        tied=bool(config.get("tie_word_embeddings", False)),
        attention_bias=config.get("model_type") == "qwen2" or config.get("attention_bias", False),
    )


@dataclass(frozen=True)
class Pools:
    """How many devices generate and how many learn."""

    generators: int
    devices_each: int
    """How many devices one generator takes."""
    ranks: int
    shared: bool = False
    """Whether generators stand on the learner's devices."""

    @property
    def devices(self) -> int:
        """Devices of all generators and ranks together."""
        if self.shared:
            return self.ranks
        return self.generators * self.devices_each + self.ranks


def costs_on(
    device: Device,
    model: ModelShape,
    pools: Pools,
    mean_context: float,
    *,
    recompute: bool,
    learner_device: Device | None = None,
    state_bytes: float = 8.0,
) -> Costs:
    """Costs of generators on `device` and a learner on `learner_device` (None is the same one).

    Args:
        mean_context: tokens that a decoding sequence attends to, on average.
        recompute: activation checkpointing, a second forward pass in every backward one.
        state_bytes: what the optimiser keeps for a parameter; 8 is AdamW's two moments.
    """
    a, trainer = Assumptions(), learner_device or device
    parallel, weights = pools.devices_each, _BYTES * model.parameters
    bandwidth = device.bandwidth * a.decode_bandwidth * parallel
    reduce_s = 2 * model.layers * a.all_reduce_s if parallel > 1 else 0.0
    products = 2 * model.parameters
    learner_rate = trainer.flops * a.learner_utilisation * pools.ranks
    publish_s = weights / a.network
    return Costs(
        decode_round_s=weights / bandwidth + reduce_s + a.round_overhead_s,
        decode_sequence_s=mean_context * model.kv_bytes / bandwidth
        + products / (device.flops * a.decode_utilisation * parallel),
        prefill_token_s=products / (device.flops * a.prefill_utilisation * parallel),
        request_s=a.request_s,
        coordinate_s=a.coordinate_s,
        verify_s=a.verify_s,
        log_group_s=a.log_group_s,
        learner_step_s=a.step_overhead_s
        + (_MASTER_BYTES + state_bytes) * model.parameters / (pools.ranks * trainer.bandwidth),
        learner_token_s=(4 if recompute else 3) * products / learner_rate,
        export_s=publish_s,
        deliver_s=0.0,
        stall_s=publish_s,
    )


@dataclass(frozen=True)
class DeviceMemory:
    """Memory of a device in bytes, by what needs it."""

    weights: float
    optimiser: float
    activations: float
    cache: float

    @property
    def total(self) -> float:
        """Bytes that are needed in all."""
        return self.weights + self.optimiser + self.activations + self.cache


_USABLE = 0.90
"""Share of a device's memory; the driver, the allocator and NCCL take the rest."""


def learner_memory(
    model: ModelShape,
    ranks: int,
    tokens: int,
    logits_mib: float,
    *,
    recompute: bool,
    state_bytes: float,
) -> DeviceMemory:
    """Memory of a learner rank: its shard, the gathered layers, a micro-batch of `tokens`.

    A layer keeps its input when it is recomputed; else about 34 bytes a hidden unit and 8 a unit
    of the MLP (bfloat16, flash attention). One layer is always there in full. `state_bytes` is what
    the optimiser keeps for a parameter.
    """
    full_layer = tokens * (34 * model.hidden + 8 * model.intermediate)
    kept = tokens * model.hidden * _BYTES if recompute else full_layer
    layer_weights = _BYTES * model.parameters / model.layers
    return DeviceMemory(
        weights=2 * layer_weights + _BYTES * model.vocabulary * model.hidden,
        optimiser=(_MASTER_BYTES + state_bytes) * model.parameters / ranks,
        activations=model.layers * kept + full_layer + 2 * logits_mib * 2**20,
        cache=0.0,
    )


def generator_memory(
    model: ModelShape, devices_each: int, device: Device, fraction: float, taken: float = 0.0
) -> DeviceMemory:
    """Memory of a generator's device: the cache gets what weights and a forward pass leave.

    `taken`: bytes of the device that a learner rank keeps.
    """
    weights = _BYTES * model.parameters / devices_each
    activations = 2e9
    cache = max(0.0, device.memory * fraction - taken - weights - activations)
    return DeviceMemory(weights, 0.0, activations, cache)


def fits(memory: DeviceMemory, device: Device) -> bool:
    """Whether the device has what is needed, beside what the driver and others take."""
    return memory.total <= device.memory * _USABLE


def cached_sequences(
    memory: DeviceMemory, model: ModelShape, devices_each: int, context: float
) -> int:
    """Sequences of `context` tokens that a generator's cache holds at a time."""
    return int(memory.cache * devices_each / (model.kv_bytes * context))
