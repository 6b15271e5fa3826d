"""Costs of a run's parts on GPUs, from data sheets: the input of `deploy.predict.simulate`.

Nothing here was measured on these devices. Peaks and bandwidths are the makers' figures; the
shares of them that software reaches are assumptions, listed in `Assumptions` and printed by `plan`.
"""

from __future__ import annotations

from dataclasses import dataclass

from common.devices import Device
from deploy.predict.simulate import Costs
from learner.policy.shape import BYTES, ModelShape
from learner.training.memory import MASTER, LearnerLoad, learner_memory


@dataclass(frozen=True)
class Assumptions:
    """Shares of the peaks that software reaches, and what no data sheet says."""

    learner_products: float = 0.50
    """Share of the matrix peak in the learner's products."""
    learner_attention: float = 0.30
    learner_bandwidth: float = 0.70
    """Share of the memory's bandwidth in all else of the learner's layers, compiled."""
    prefill_utilisation: float = 0.50
    decode_bandwidth: float = 0.70
    decode_utilisation: float = 0.30
    round_overhead_s: float = 2e-3
    """Seconds for scheduling, sampling and kernel launches of a decoding round."""
    all_reduce_s: float = 20e-6
    """Seconds of an all-reduce; tensor parallelism has two a layer."""
    network: float = 40e9
    """Bytes/s between nodes, of each device; into each generator at once (broadcast)."""
    host_link: float = 20e9
    """Bytes/s between a device and pinned memory of its host, one way (PCIe 4, 16 lanes)."""
    host_copies: float = 1.5e9
    """Bytes/s through the object store, with its copies and checksums."""
    reload_layer_s: float = 0.02
    """Seconds of vLLM's reload for each layer, which Python goes through."""
    adapter_layer_s: float = 5e-4
    """Seconds of vLLM's for a layer's adapters, where these are sent alone; measured on a CPU."""
    request_s: float = 1e-4
    coordinate_s: float = 0.002
    """Seconds a group, measured on cores slower than a cluster's, as the section "Predictions" of
    `tests/bench/results/README.md` has it."""
    verify_s: float = 0.02
    log_group_s: float = 2e-3
    step_overhead_s: float = 0.5


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


@dataclass(frozen=True)
class Pass:
    """Seconds that a learner rank spends on a micro-batch, by what they go to."""

    tokens: int
    products: float
    attention: float
    vectors: float
    """Norms, rotations, activation functions and logits: bound by memory."""
    messages: float
    """Gathering weights and reducing gradients, beside the work as far as that lasts."""
    copies: float
    """Activations to the host and back, beside no work."""
    useful: float
    """Operations that count for the share of the peak: 6 a weight and token."""
    flops: float

    @property
    def exposed(self) -> float:
        """Seconds for which nothing is computed, since messages are under way."""
        return max(0.0, self.messages - self.products - self.attention - self.vectors)

    @property
    def seconds(self) -> float:
        """Seconds of all."""
        return self.products + self.attention + self.vectors + self.exposed + self.copies

    @property
    def mfu(self) -> float:
        """Share of the device's peak."""
        return self.useful / (self.seconds * self.flops)


def learner_pass(
    device: Device, model: ModelShape, load: LearnerLoad, mean_context: float, per_node: int
) -> Pass:
    """What a micro-batch of `load.tokens` costs a learner rank on `device`."""
    a, tokens = Assumptions(), load.tokens
    passes = 4 if load.recompute else 3
    frozen = 1 if load.adapters else 0  # a frozen weight has no gradient of its own
    inside = 2.0 * model.layers * model.layer_parameters
    # The head's product is made again in its backward pass.
    products = (passes - frozen) * inside + (4 - frozen) * 2.0 * model.embedding
    products += passes * 2.0 * load.adapters
    width = model.heads * model.head_size
    # Two products over the tokens before; the backward pass has five, and none is counted twice.
    attention = (passes + 0.5) * 4.0 * mean_context * width * model.layers
    vectors = passes * 2.0 * model.layers * (13 * model.hidden + 3.5 * model.intermediate)
    vectors += 12.0 * model.vocabulary
    shards = load.shards
    rate = device.link if shards <= per_node else a.network
    others = (shards - 1) / shards
    trained = load.adapters or model.parameters
    gradients = 0.0 if load.reduce_once else 4.0 * trained
    return Pass(
        tokens,
        products=tokens * products / (device.flops * a.learner_products),
        attention=tokens * attention / (device.flops * a.learner_attention),
        vectors=tokens * vectors / (device.bandwidth * a.learner_bandwidth),
        messages=others * (2 * BYTES * model.parameters + gradients) / rate,
        copies=2 * learner_memory(model, load).host / a.host_link,
        useful=(6.0 - 2.0 * frozen) * tokens * model.parameters,
        flops=device.flops,
    )


@dataclass(frozen=True)
class Publish:
    """Seconds of an update of the generators' weights."""

    travel: float
    load: float


def publish_times(
    model: ModelShape, device: Device, transport: str, *, one_node: bool, adapters: float = 0.0
) -> Publish:
    """How long weights travel by `transport`, and how long vLLM takes to load them.

    Args:
        adapters: parameters of the adapters that travel in their place, in float32; 0 for none.
    """
    a = Assumptions()
    weights = MASTER * adapters or BYTES * model.parameters
    rates = {
        "nccl": device.link if one_node else a.network,
        "ipc": device.bandwidth / 4,
        "object_store": a.host_copies,
    }
    # vLLM writes each tensor twice: into the layer as loaded, and into its place.
    layer_s = a.adapter_layer_s if adapters else a.reload_layer_s
    load_s = model.layers * layer_s + 4 * weights / device.bandwidth
    return Publish(weights / rates.get(transport, a.host_copies), load_s)


def costs_on(
    device: Device,
    model: ModelShape,
    pools: Pools,
    mean_context: float,
    *,
    learner: Pass,
    publish: Publish,
    learner_device: Device | None = None,
    state_bytes: float = 8.0,
    master_bytes: float = 4.0,
    scored: float = 0.0,
    trained: float | None = None,
    critic: bool = False,
    quantization: str | None = None,
) -> Costs:
    """Costs of generators on `device` and a learner on `learner_device` (None is the same one).

    Args:
        mean_context: tokens that a decoding sequence attends to, on average.
        learner: a micro-batch of a rank.
        state_bytes: what the optimiser keeps for a parameter; 8 is AdamW's two moments.
        master_bytes: those of a weight that is trained, and of its gradient.
        scored: parameters of a model that scores all tokens of a step.
        trained: parameters that the optimiser steps on; None is all.
        critic: a critic as large as the policy values every token, and learns from it.
        quantization: `generator.quantization`. Weights are read faster, products counted as before.
    """
    a, trainer = Assumptions(), learner_device or device
    parallel, weights = pools.devices_each, model.sampler_bytes(quantization)
    bandwidth = device.bandwidth * a.decode_bandwidth * parallel
    reduce_s = 2 * model.layers * a.all_reduce_s if parallel > 1 else 0.0
    products, stepped = 2 * model.parameters, trained or model.parameters
    models = 2 if critic else 1
    scored += model.parameters if critic else 0
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
        + models * (2 * master_bytes + state_bytes) * stepped / (pools.ranks * trainer.bandwidth),
        learner_token_s=models * learner.seconds / (learner.tokens * pools.ranks)
        + 2 * scored / (trainer.flops * a.learner_products * pools.ranks),
        export_s=publish.travel,
        deliver_s=0.0,
        stall_s=publish.travel + publish.load,
    )
