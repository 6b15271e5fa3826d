"""`grpo-lambda plan` for GPUs: who stands where, what fits, and how long a step would take."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from common.config.sections import Config
from common.errors import UserError
from deploy.predict.costs import (
    DEVICES,
    Assumptions,
    Device,
    DeviceMemory,
    ModelShape,
    Pools,
    cached_sequences,
    costs_on,
    fits,
    generator_memory,
    learner_memory,
    model_shape,
)
from deploy.predict.simulate import (
    Costs,
    Lengths,
    Prediction,
    Simulation,
    Workload,
    lognormal_lengths,
    measured_lengths,
)
from learner.training.optimizer import state_bytes

_MEDIAN, _SPREAD = 0.3, 0.6
"""Lengths of completions where no log is given: median as a share of the longest, and sigma."""
_STEPS = 24
"""Learner steps of a simulation."""
_PROMPT = 0.25
"""Length of a prompt where no log is given, as a share of the context beside the completion."""


@dataclass(frozen=True)
class ClusterPlan:
    """A run on the devices of `placement.generator_device` and `placement.learner_device`."""

    config: Config
    model: ModelShape
    generator_device: Device
    learner_device: Device
    pools: Pools
    learner_memory: DeviceMemory
    generator_memory: DeviceMemory

    @classmethod
    def of(cls, config: Config) -> ClusterPlan:
        """Plan the run of `config`. Raises `UserError` for an unknown device or model."""
        generator, learner = config.generator, config.learner
        model = model_shape(config.model.path)
        device = _device("placement.generator_device", config.placement.generator_device)
        trainer = _device(
            "placement.learner_device",
            config.placement.learner_device or config.placement.generator_device,
        )
        shared = config.transport.shares_devices
        pools = Pools(generator.count, generator.devices, learner.ranks, shared)
        training = learner_memory(
            model,
            learner.shard_ranks or learner.ranks,
            max(config.batch.tokens_per_microbatch, config.model.max_length),
            learner.logits_mib,
            recompute=learner.activation_checkpointing,
            state_bytes=state_bytes(learner),
        )
        kept = training.optimiser if shared else 0.0
        fraction = generator.memory_fraction
        return cls(
            config,
            model,
            device,
            trainer,
            pools,
            training,
            generator_memory(model, generator.devices, device, fraction, kept),
        )

    @property
    def problems(self) -> list[str]:
        """What does not fit and what to change, a sentence each; empty where all fits."""
        found, mine, theirs = [], self.learner_memory, self.generator_memory
        if not fits(mine, self.learner_device):
            found.append(
                f"a learner rank needs {_gb(mine.total)} and has {_gb(self.learner_device.memory)}:"
                " more learner.ranks, learner.activation_checkpointing=true, or fewer "
                "batch.tokens_per_microbatch"
            )
        if self.sequences < 1:
            found.append(
                f"a generator's device holds {_gb(theirs.weights)} of weights and no sequence of "
                f"{self.config.model.max_length} tokens: a larger generator.tensor_parallel "
                "or generator.pipeline_parallel"
            )
        return found

    @property
    def sequences(self) -> int:
        """Sequences of full length that a generator runs at a time."""
        config = self.config
        room = cached_sequences(
            self.generator_memory, self.model, self.pools.devices_each, config.model.max_length
        )
        return min(room, config.generator.max_concurrent_sequences)

    @property
    def prompt_tokens(self) -> int:
        """Assumed length of a prompt."""
        room = self.config.model.max_length - self.config.generator.max_completion_tokens
        return int(_PROMPT * room)

    def workload(self) -> Workload:
        """What the run asks of the simulation."""
        sequences = max(1, self.sequences)
        return Workload.of(self.config, sequences=sequences, prompt_tokens=self.prompt_tokens)

    def costs(self) -> Costs:
        """Costs from the data sheets of the devices."""
        mean = _MEDIAN * self.config.generator.max_completion_tokens
        return costs_on(
            self.generator_device,
            self.model,
            self.pools,
            self.prompt_tokens + mean / 2,
            recompute=self.config.learner.activation_checkpointing,
            learner_device=self.learner_device,
            state_bytes=state_bytes(self.config.learner),
        )

    def predict(
        self, lengths: Lengths | None = None, costs: Costs | None = None, steps: int = _STEPS
    ) -> Prediction:
        """Predict a step by simulation.

        Args:
            lengths: lengths of completions; None assumes them.
            costs: measured costs; None takes those of the data sheets.
            steps: learner steps that are simulated.
        """
        lengths = lengths or assumed_lengths(self.config)
        return Simulation(self.workload(), costs or self.costs(), lengths).run(steps)

    def splits(self, lengths: Lengths | None = None) -> list[tuple[ClusterPlan, Prediction]]:
        """Other divisions of these devices between generation and learning, fastest first.

        Only where both pools are of one kind, and only what fits.
        """
        if self.generator_device != self.learner_device or self.pools.shared:
            return []
        found = []
        parallel, devices = self.pools.devices_each, self.pools.devices
        for count in _counts(devices // parallel):
            ranks = devices - count * parallel
            if ranks < 1 or ranks % (self.config.learner.shard_ranks or 1):
                continue
            generator = replace(self.config.generator, count=count)
            learner = replace(self.config.learner, ranks=ranks)
            plan = ClusterPlan.of(replace(self.config, generator=generator, learner=learner))
            if not plan.problems:
                found.append((plan, plan.predict(lengths, steps=_STEPS // 2)))
        return sorted(found, key=lambda each: each[1].step_s)

    def lines(self, lengths: Lengths | None = None, costs: Costs | None = None) -> list[str]:
        """The plan as lines of text."""
        plan = ["# Pools", *self._pool_lines(), "", "# Memory a device", *self._memory_lines()]
        if problems := self.problems:
            return [*plan, "", "# This does not fit", *(f"- {problem}" for problem in problems)]
        prediction = self.predict(lengths, costs)
        source = "measured costs" if costs else str(Assumptions())
        plan += ["", "# Predicted step", *prediction_lines(prediction), f"from {source}"]
        if splits := [] if costs else self.splits(lengths)[:3]:
            plan += ["", f"# Best splits of {self.pools.devices} devices"]
            plan += [
                f"generator.count={p.pools.generators} learner.ranks={p.pools.ranks}: "
                f"{q.step_s:.1f} s a step, {q.completions_per_s:.1f} completions/s"
                for p, q in splits
            ]
        return plan

    def _pool_lines(self) -> list[str]:
        placement, pools = self.config.placement, self.pools
        per_node, trainer = placement.gpus_per_node, placement.learner_device
        generating = pools.generators * pools.devices_each
        return [
            f"generators    {pools.generators} of {pools.devices_each} x "
            f"{placement.generator_device} on {_nodes(generating, per_node)} node(s)",
            f"learner       {pools.ranks} x {trainer or placement.generator_device} on "
            f"{_nodes(pools.ranks, per_node)} node(s)",
            *(["together      in turns on the same devices"] if pools.shared else []),
            f"verifiers     {self.config.verifier.workers} on CPUs",
        ]

    def _memory_lines(self) -> list[str]:
        mine, theirs = self.learner_memory, self.generator_memory
        return [
            f"learner       weights {_gb(mine.weights)}, optimiser {_gb(mine.optimiser)}, "
            f"activations {_gb(mine.activations)} of {_gb(self.learner_device.memory)}",
            f"generator     weights {_gb(theirs.weights)}, cache {_gb(theirs.cache)} of "
            f"{_gb(self.generator_device.memory)}: {self.sequences} sequences of "
            f"{self.config.model.max_length} tokens at a time",
        ]


def prediction_lines(found: Prediction) -> list[str]:
    """A prediction as lines of text."""
    return [
        f"step          {found.step_s:.2f} s, {found.completions_per_s:.1f} completions/s",
        f"busy          generators {found.generating:.0%}, learner {found.learning:.0%}, "
        f"verifiers {found.verifying:.0%}, coordinator {found.coordinating:.0%}, "
        f"log {found.logging:.0%}",
        f"bottleneck    {found.bottleneck}",
    ]


def assumed_lengths(config: Config) -> Lengths:
    """Lengths of completions where no run was measured."""
    longest = config.generator.max_completion_tokens
    return lognormal_lengths(_MEDIAN * longest, _SPREAD, longest)


def logged_lengths(run: Path) -> Lengths:
    """Read the lengths of completions from a run's trajectory log."""
    from common.record.schema import sampled_lengths
    from common.record.trajectory_log import read_log

    pool = [int(n) for batch in read_log(run / "trajectories") for n in sampled_lengths(batch)]
    if not pool:
        raise UserError(f"{run} has no completions in its trajectory log: give one that trained")
    return measured_lengths(pool)


def _counts(most: int) -> list[int]:
    """Up to twelve numbers of generators, evenly in 1..most."""
    return sorted({max(1, round(most * part / 12)) for part in range(1, 13)})


def _device(key: str, name: str | None) -> Device:
    if name not in DEVICES:
        raise UserError(f"{key}={name}: known are {', '.join(sorted(DEVICES))}")
    return DEVICES[name]


def _nodes(devices: int, per_node: int) -> int:
    return -(-devices // per_node)


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB"
