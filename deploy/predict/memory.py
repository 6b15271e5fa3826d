"""The memory plan of a device: who takes how many bytes of it. `plan` prints it, a run obeys it.

    contexts   CUDA's, one for each process on the device; NCCL's buffers where ranks talk
    learner    see `learner.training.memory`: what it keeps, and its peak in a step
    generator  weights in bfloat16 or eight bits, adapters that are sent alone, a forward pass, CUDA
               graphs, and the rest of its share: the cache

Where both stand on one device they take turns. While one generates, the other holds what it keeps;
while the learner steps, the generator sleeps and holds its context alone. So the cache gets what
the learner's weights and optimiser leave of the device.
"""

from __future__ import annotations

from dataclasses import dataclass

from common.config.sections import Config
from deploy.placement.memory import served_parameters
from deploy.predict.models import model_shape
from learner.policy.shape import BYTES, ModelShape
from learner.training.memory import (
    CONTEXT,
    NCCL,
    SLACK,
    LearnerLoad,
    LearnerMemory,
    OtherModels,
    fitting,
    learner_memory,
)
from learner.training.optimizer import MASTERS, state_bytes

_GRAPHS = 1.0e9
"""CUDA graphs of a generator that compiles."""
_LOGIT_COPIES = 4
"""Float32 logits of all running sequences that sampling holds at a time."""


@dataclass(frozen=True)
class GeneratorMemory:
    """Bytes of a generator's device, by what needs them."""

    weights: float
    activations: float
    """A forward pass, sampling and CUDA graphs."""
    cache: float
    """The key-value cache: what is left of its share. At most what all sequences can fill."""


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of the devices of a run."""

    generator_device: float
    learner_device: float
    shared: bool
    """Whether a generator and a learner rank take turns on each device."""
    generator_contexts: float
    learner_contexts: float
    generator: GeneratorMemory
    learner: LearnerMemory
    load: LearnerLoad
    """What the learner's memory was counted for, recompute or not."""

    @property
    def kv_cache_bytes(self) -> int:
        """Bytes of the key-value cache on each of a generator's devices."""
        return int(self.generator.cache)

    @property
    def learner_needs(self) -> float:
        """Bytes of a learner's device in a step, with what stands beside the learner."""
        return self.learner_contexts + self.learner.peak + SLACK * self.learner_device

    @property
    def learner_fits(self) -> bool:
        """Whether a learner's device has what a step needs."""
        return self.learner_needs <= self.learner_device


def memory_plan(
    config: Config,
    model: ModelShape,
    generator_device: float,
    learner_device: float | None = None,
) -> MemoryPlan:
    """Divide the memory of the devices, each of so many bytes, between the parts of a run.

    Args:
        learner_device: None where it is of the kind of `generator_device`.
    """
    shared = config.transport.shares_devices
    trainer = learner_device or generator_device
    own = CONTEXT + (NCCL if config.learner.ranks > 1 else 0.0)
    devices = config.generator.devices
    theirs = CONTEXT + (NCCL if devices > 1 or not shared else 0.0)
    both = own + theirs
    load = learner_load(config, model, trainer * (1 - SLACK) - (both if shared else own))
    learner = learner_memory(model, load)
    weights = model.sampler_bytes(config.generator.quantization) / devices
    if config.served_adapter is not None:  # whole: tensor parallelism divides only half of it
        weights += BYTES * served_parameters(config.served_adapter, load.adapters)
    activations = _forward_pass(config, model)
    taken = both + learner.kept if shared else theirs
    room = config.generator.memory_fraction * generator_device - taken - weights - activations
    useful = config.generator.max_concurrent_sequences * config.model.max_length
    cache = max(0.0, min(room, useful * model.kv_bytes / devices))
    return MemoryPlan(
        generator_device,
        trainer,
        shared,
        both if shared else theirs,
        both if shared else own,
        GeneratorMemory(weights, activations, cache),
        learner,
        load,
    )


def learner_load(config: Config, model: ModelShape, room: float) -> LearnerLoad:
    """What a rank of the run of `config` is asked to hold, with `room` bytes for it."""
    learner, adapter = config.learner, config.model.adapter
    load = LearnerLoad(
        shards=learner.shard_ranks or learner.ranks,
        tokens=max(config.batch.tokens_per_microbatch, config.model.max_length),
        logits_mib=learner.logits_mib,
        recompute=False,
        state_bytes=state_bytes(learner, adapter.rank),
        others=OtherModels.of(
            config.algorithm, 0.0 if config.teacher.offload else teacher_parameters(config)
        ),
        adapters=model.adapter_parameters(adapter.rank, adapter.targets),
        master=MASTERS[learner.masters].itemsize,
        offload=learner.activation_offload,
    )
    return fitting(model, load, room, learner.activation_checkpointing, learner.reduce_once)


def teacher_parameters(config: Config) -> float:
    """Parameters of the teacher that the learner's ranks hold; 0 without one."""
    path = None if config.teacher.count else config.teacher.path
    return float(model_shape(path).parameters) if path else 0.0


def _forward_pass(config: Config, model: ModelShape) -> float:
    """Bytes of a generator's device for a batch, its sampling, and CUDA graphs."""
    generator = config.generator
    batch = generator.batched_tokens * BYTES * (3 * model.intermediate + 4 * model.hidden)
    logits = 4 * _LOGIT_COPIES * generator.max_concurrent_sequences * model.vocabulary
    return (batch + logits) / generator.devices + (0.0 if generator.enforce_eager else _GRAPHS)
