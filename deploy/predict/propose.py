"""`grpo-lambda plan --devices 2x8xH100`: a configuration that fits these devices, if there is one.

The lengths, the method and the batch are those of the configuration at hand. What is varied is
where the parts stand and how much a micro-batch holds. A proposal gives up as little as it can, in
this order: shorter micro-batches, then shorter completions. Of what fits, the fastest is taken.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from common.config.sections import Config
from common.devices import DEVICES
from common.errors import UserError
from common.weights.registry import TRANSPORTS, TransportName
from deploy.predict.cluster_plan import ClusterPlan, learner_pools

_GIVEN = re.compile(r"(?:(\d+)x)?(\d+)x([A-Za-z].*)")
_SHORTEST_MICROBATCH = 2048
_STEPS = 14
"""Steps of the simulation by which proposals are compared."""
_GRACE = 1.5
"""Steps that fit into the grace after SIGTERM; half a minute to save comes on top."""


@dataclass(frozen=True)
class Devices:
    """Equal nodes of equal devices."""

    nodes: int
    per_node: int
    name: str

    @property
    def count(self) -> int:
        """How many there are."""
        return self.nodes * self.per_node


@dataclass(frozen=True)
class Proposal:
    """A configuration that fits, its plan, and what it gives up."""

    config: Config
    plan: ClusterPlan
    step_s: float
    gives_up: list[str]

    def keys(self, base: Config) -> list[str]:
        """The keys that differ from `base`, as on a command line."""
        return [f"{key}={value}" for key, value in _changed(base, self.config)]

    def lines(self, base: Config) -> list[str]:
        """What it is and what it costs, as text."""
        pools = self.plan.pools
        where = (
            f"{pools.ranks} generator(s) and {pools.ranks} learner rank(s) in turns"
            if pools.shared
            else f"{pools.generators} generator(s) and {pools.ranks} learner rank(s) apart"
        )
        return [
            f"# Proposal for {pools.devices} x {self.config.placement.generator_device}",
            f"{base.model.path}: {where}, {self.step_s:.1f} s a step",
            "",
            "# What it gives up",
            *(f"- {each}" for each in self.gives_up or ["nothing of what was asked"]),
        ]


def devices_of(text: str) -> Devices:
    """Read `8xH100`, `1xRTX4090`, `2xA100-80GB` or `2x8xH100` (nodes first).

    Raises:
        UserError: it is none of these, or no device that is known here.
    """
    known = ", ".join(sorted(DEVICES))
    match = _GIVEN.fullmatch(text.strip())
    if match is None or "0" in (match[1], match[2]):
        raise UserError(
            f"--devices {text}: give a number and a device, as 1xRTX4090 or 8xH100, with nodes "
            f"before it for several, as 2x8xH100. Known are {known}"
        )
    wanted = match[3].upper().replace(" ", "")
    found = [name for name in DEVICES if wanted in (name, name.partition("-")[0])]
    if len(found) != 1:
        which = f"say which of {', '.join(found)}" if found else f"known are {known}"
        raise UserError(f"--devices {text}: {which}")
    return Devices(int(match[1] or 1), int(match[2]), found[0])


def propose(config: Config, devices: Devices) -> Proposal:
    """The configuration for these devices that gives up least, and of those the fastest.

    Raises:
        UserError: nothing fits; it says what is missing.
    """
    nearest: ClusterPlan | None = None
    for shorter in _shorter(config):
        found = []
        for placed in _placed(shorter, devices):
            plan = ClusterPlan.of(placed)
            if plan.problems:
                nearest = min(filter(None, (nearest, plan)), key=_short_of)
            else:
                found.append((plan.predict(steps=_STEPS).step_s, plan))
        if found:
            step_s, plan = min(found, key=lambda each: each[0])
            grace = max(config.checkpoint.stop_grace_s, grace_of(step_s))
            kept = replace(plan.config, checkpoint=replace(config.checkpoint, stop_grace_s=grace))
            return Proposal(kept, plan, step_s, _given_up(config, plan))
    assert nearest is not None
    raise UserError(
        f"nothing fits {config.model.path} on {devices.count} x {devices.name}, whatever is given "
        f"up. Nearest with learner.ranks={nearest.pools.ranks}: {'; '.join(nearest.problems)}. "
        "More devices, larger ones or a smaller model are what is left"
    )


def grace_of(step_s: float) -> float:
    """Seconds after SIGTERM in which a step of `step_s` that has just begun ends and is saved."""
    return float(10 * round(_GRACE * step_s / 10 + 3))


def _short_of(plan: ClusterPlan) -> float:
    return plan.memory.learner_needs - plan.memory.learner_device


def _shorter(config: Config) -> Iterator[Config]:
    """The configuration with shorter micro-batches, then with shorter completions too."""
    asked = config.generator.max_completion_tokens
    prompt = config.model.max_length - asked
    completion = asked
    while completion >= min(asked, 512):
        generator = replace(config.generator, max_completion_tokens=completion)
        length = prompt + completion
        budget = max(config.batch.tokens_per_microbatch, length)
        while budget >= max(length, _SHORTEST_MICROBATCH):
            yield replace(
                config,
                generator=generator,
                model=replace(config.model, max_length=length),
                batch=replace(config.batch, tokens_per_microbatch=budget),
            )
            budget = max(length, budget // 2) if budget > length else 0
        completion //= 2


def _placed(config: Config, devices: Devices) -> Iterator[Config]:
    """Where the parts may stand on these devices: in turns on all of them, and apart."""
    placement = replace(
        config.placement,
        generator_device=devices.name,
        learner_device=None,
        gpus_per_node=devices.per_node,
    )
    base = replace(config, placement=placement)
    address = "local" if devices.nodes == 1 else "auto"
    base = replace(base, ray=replace(base.ray, address=address))
    yield _with(base, "ipc", devices.count, 1, devices.count, devices)
    for ranks in learner_pools(devices.count, devices.per_node):
        # More devices a generator only where fewer do not hold it.
        for parallel in (1, 2, 4, 8):
            left = devices.count - ranks
            if parallel > min(left, devices.per_node) or left % parallel:
                break
            apart = _with(base, "nccl", left // parallel, parallel, ranks, devices)
            if ClusterPlan.of(apart).sequences >= 1:
                yield apart
                break


def _with(
    config: Config,
    transport: TransportName,
    count: int,
    parallel: int,
    ranks: int,
    devices: Devices,
) -> Config:
    """`config` with so many generators and ranks."""
    turns = TRANSPORTS[transport].shares_devices
    publish = config.weights.publish if TRANSPORTS[transport].carries_adapters else "merged"
    staleness = 0 if turns else max(1, config.generator.max_staleness)
    spans = ranks > devices.per_node and ranks % devices.per_node == 0
    return replace(
        config,
        generator=replace(
            config.generator,
            count=count,
            tensor_parallel=parallel,
            pipeline_parallel=1,
            max_staleness=staleness,
            memory_fraction=0.9,
            min_count=None,
        ),
        learner=replace(
            config.learner,
            device="cuda",
            ranks=ranks,
            activation_checkpointing=None,
            reduce_once=None,
            shard_ranks=devices.per_node if spans else None,
        ),
        weights=replace(config.weights, transport=transport, publish=publish),
    )


def _given_up(asked: Config, plan: ClusterPlan) -> list[str]:
    """What the plan gives up, against what was asked and what is fastest; a sentence each."""
    config, memory, found = plan.config, plan.memory, []
    if memory.shared:
        found.append(
            "overlap: generators and learner take turns on the same devices, without staleness"
        )
    if config.weights.publish != asked.weights.publish:
        found.append(
            f"adapters alone on the way: weights.transport={config.weights.transport} carries all "
            "weights, with adapters merged"
        )
    if config.generator.max_completion_tokens < asked.generator.max_completion_tokens:
        found.append(
            f"length: completions end at {config.generator.max_completion_tokens} tokens instead "
            f"of {asked.generator.max_completion_tokens}"
        )
    if config.batch.tokens_per_microbatch < asked.batch.tokens_per_microbatch:
        found.append(
            f"speed: micro-batches of {config.batch.tokens_per_microbatch} tokens instead of "
            f"{asked.batch.tokens_per_microbatch}; gradients are the same"
        )
    if memory.load.recompute:
        found.append("speed: activations are computed twice, about a quarter of a learner step")
    if plan.sequences < config.generator.max_concurrent_sequences:
        found.append(
            f"speed: a generator's cache holds {plan.sequences} sequences at a time, of "
            f"{config.generator.max_concurrent_sequences} that are allowed"
        )
    if config.generator.tensor_parallel > 1:
        found.append(
            f"speed: a generator needs {config.generator.tensor_parallel} devices, which wait for "
            "each other twice a layer"
        )
    return found


def _changed(base: Config, other: Config) -> Sequence[tuple[str, str]]:
    """Keys of the sections that a proposal touches, where they differ."""
    sections = ("model", "batch", "generator", "learner", "weights", "checkpoint", "placement")
    found = []
    for section in (*sections, "ray"):
        old, new = vars(getattr(base, section)), vars(getattr(other, section))
        for key, value in new.items():
            if value != old[key]:
                found.append((f"{section}.{key}", _shown(value)))
    return found


def _shown(value: object) -> str:
    """As it is written on a command line."""
    return (
        str(value).lower() if isinstance(value, bool) else "null" if value is None else str(value)
    )
