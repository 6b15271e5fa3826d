"""`grpo-lambda plan` for GPUs: who stands where, what fits, and how long a step would take."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

from common.config.quantization import check_device
from common.config.sections import Config
from common.devices import Device, device
from common.errors import UserError
from deploy.predict.costs import Assumptions, Pass, Pools, costs_on, learner_pass, publish_times
from deploy.predict.memory import MemoryPlan, memory_plan, teacher_parameters
from deploy.predict.models import model_shape
from deploy.predict.notes import adapter_line, publish_line
from deploy.predict.simulate import (
    Costs,
    Lengths,
    Prediction,
    Simulation,
    Workload,
    lognormal_lengths,
    measured_lengths,
)
from learner.policy.shape import ModelShape
from learner.training.memory import MASTER, LearnerLoad

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
    memory: MemoryPlan

    @classmethod
    def of(cls, config: Config) -> ClusterPlan:
        """Plan the run of `config`. Raises `UserError` for an unknown device or model."""
        placement = config.placement
        here = device("placement.generator_device", placement.generator_device)
        trainer = device(
            "placement.learner_device", placement.learner_device or placement.generator_device
        )
        return cls.on(config, here, trainer)

    @classmethod
    def on(cls, config: Config, here: Device, trainer: Device) -> ClusterPlan:
        """Plan the run of `config`, with generators on devices like `here`.

        Raises: `UserError` where generators on such devices do not compute as they are to.
        """
        check_device(config.generator.quantization, cuda=True)
        generator, learner = config.generator, config.learner
        model = model_shape(config.model.path)
        pools = Pools(
            generator.count,
            generator.devices,
            learner.ranks,
            shared=config.transport.shares_devices,
        )
        memory = memory_plan(config, model, here.memory, trainer.memory)
        return cls(config, model, here, trainer, pools, memory)

    @property
    def problems(self) -> list[str]:
        """What does not fit and what to change, a sentence each; empty where all fits."""
        found, memory = [], self.memory
        if not memory.learner_fits:
            found.append(
                f"a learner rank needs {_gb(memory.learner_needs)} and has "
                f"{_gb(memory.learner_device)}: more learner.ranks, "
                "learner.activation_checkpointing=true, fewer batch.tokens_per_microbatch, or what "
                "learner.optimizer.state=8bit, learner.masters=bfloat16 or model.adapter save"
            )
        if self.sequences < 1:
            taken = memory.generator_contexts + memory.generator.weights
            found.append(
                f"a generator's device holds {_gb(taken)} of weights and contexts"
                + (f", {_gb(memory.learner.kept)} of the learner's" if memory.shared else "")
                + f" and no sequence of {self.config.model.max_length} tokens: "
                + (
                    "a smaller model, or devices of its own for each"
                    if memory.shared
                    else "a larger generator.tensor_parallel or generator.pipeline_parallel"
                )
            )
        return found

    @property
    def sequences(self) -> int:
        """Sequences that a generator runs at a time, of which its paged cache holds the tokens.

        Its cache is filled as sequences grow, so the mean context counts; one of full length must
        fit all the same.
        """
        config = self.config
        tokens = self.memory.generator.cache * self.pools.devices_each / self.model.kv_bytes
        if tokens < config.model.max_length:
            return 0
        room = int(tokens / max(1.0, self.mean_context))
        return min(room, config.generator.max_concurrent_sequences)

    @property
    def mean_context(self) -> float:
        """Tokens that a decoding sequence attends to, on average.

        It is half way through a completion of those that run, of which long ones are more.
        """
        median = _MEDIAN * self.config.generator.max_completion_tokens
        return self.prompt_tokens + median * math.exp(1.5 * _SPREAD**2) / 2

    @property
    def prompt_tokens(self) -> int:
        """Assumed length of a prompt."""
        room = self.config.model.max_length - self.config.generator.max_completion_tokens
        return int(_PROMPT * room)

    def workload(self) -> Workload:
        """What the run asks of the simulation."""
        sequences = max(1, self.sequences)
        return Workload.of(self.config, sequences=sequences, prompt_tokens=self.prompt_tokens)

    @property
    def learner_pass(self) -> Pass:
        """What a micro-batch costs a learner rank."""
        median = _MEDIAN * self.config.generator.max_completion_tokens
        context = self.prompt_tokens + median * math.exp(0.5 * _SPREAD**2) / 2
        per_node = self.config.placement.gpus_per_node
        return learner_pass(self.learner_device, self.model, self.memory.load, context, per_node)

    def costs(self) -> Costs:
        """Costs from the data sheets of the devices."""
        placement = self.config.placement
        publish = publish_times(
            self.model,
            self.generator_device,
            self.config.weights.transport,
            one_node=self.pools.devices <= placement.gpus_per_node,
            adapters=self.memory.load.adapters if self.config.served_adapter is not None else 0.0,
        )
        return costs_on(
            self.generator_device,
            self.model,
            self.pools,
            self.mean_context,
            learner=self.learner_pass,
            publish=publish,
            learner_device=self.learner_device,
            state_bytes=self.memory.load.state_bytes,
            master_bytes=self.memory.load.master,
            scored=self._scored_parameters,
            trained=self.memory.load.adapters or None,
            critic=self.config.algorithm.needs_critic,
            quantization=self.config.generator.quantization,
        )

    @property
    def _scored_parameters(self) -> float:
        """Parameters of the models that score all tokens of a step, added up; 0 without one."""
        advantage, own = self.config.algorithm.advantage, float(self.model.parameters)
        if advantage.scorer is None:
            return 0.0
        scorer = teacher_parameters(self.config) if advantage.scorer == "teacher" else own
        return scorer + (own if advantage.against == "policy" else 0.0)

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

        Only where both pools are of one kind, only what fits, and only as people divide nodes.
        """
        if self.generator_device != self.learner_device or self.pools.shared:
            return []
        found = []
        parallel, devices = self.pools.devices_each, self.pools.devices
        per_node = self.config.placement.gpus_per_node
        for ranks in learner_pools(devices, per_node):
            if (devices - ranks) % parallel:
                continue
            generator = replace(self.config.generator, count=(devices - ranks) // parallel)
            shards = per_node if ranks > per_node else None
            learner = replace(self.config.learner, ranks=ranks, shard_ranks=shards)
            plan = ClusterPlan.of(replace(self.config, generator=generator, learner=learner))
            if not plan.problems:
                found.append((plan, plan.predict(lengths, steps=_STEPS // 2)))
        return sorted(found, key=lambda each: each[1].step_s)

    def lines(
        self,
        lengths: Lengths | None = None,
        costs: Costs | None = None,
        prediction: Prediction | None = None,
    ) -> list[str]:
        """The plan as lines of text; without a `prediction` it predicts."""
        plan = ["# Pools", *self._pool_lines(), "", "# Memory a device", *self.memory_lines()]
        if problems := self.problems:
            return [*plan, "", "# This does not fit", *(f"- {problem}" for problem in problems)]
        prediction = prediction or self.predict(lengths, costs)
        source = "measured costs" if costs else str(Assumptions())
        plan += ["", "# Predicted step", *prediction_lines(prediction)]
        if not costs:
            plan += self._pass_lines()
        plan += [f"from {source}"]
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

    def _pass_lines(self) -> list[str]:
        """What the learner's devices do, as lines of text."""
        work = self.learner_pass
        return [
            f"micro-batch   {work.tokens} tokens in {work.seconds:.2f} s of a rank: products "
            f"{work.products:.2f}, attention {work.attention:.2f}, vectors {work.vectors:.2f}, "
            f"messages {work.messages:.2f} of which {work.exposed:.2f} beside no work"
            + (f", copies to the host and back {work.copies:.2f}" if work.copies else "")
            + f"; {work.mfu:.0%} of the device's peak",
            f"ways          {_ways(self.memory.load)}",
        ]

    def _adapter_lines(self) -> list[str]:
        """What is trained, where that is not all."""
        adapter, trained = self.config.model.adapter, self.memory.load.adapters
        line = adapter_line(adapter, int(trained), self.model.parameters)
        if not trained:
            return []
        published = publish_line(self.config, int(trained), self.model.parameters)
        return [f"trained       {line}", f"published     {published}"]

    def _saving_lines(self) -> list[str]:
        """What takes less memory than usual, and how much a parameter or in all."""
        learner, load = self.config.learner, self.memory.load
        found = []
        if learner.masters != "float32":
            found.append(f"weights that are trained {load.master} bytes, not {MASTER}")
        if learner.optimizer.state != "float32":
            found.append(f"optimiser states {load.state_bytes:.2f} bytes, not 8")
        if load.offload:
            found.append(
                f"activations of {_gb(self.memory.learner.host)} a rank wait in the host's memory"
            )
        return [f"saving        {'; '.join(found)}"] if found else []

    def memory_lines(self) -> list[str]:
        """The memory of the devices as lines of text."""
        memory, mine, theirs = self.memory, self.memory.learner, self.memory.generator
        return [
            f"learner       {_gb(memory.learner_needs)} of {_gb(memory.learner_device)}: weights "
            f"and optimiser {_gb(mine.kept)}, gradients {_gb(mine.gradients)}, gathered "
            f"{_gb(mine.gathered)}, head {_gb(mine.head)}, activations {_gb(mine.activations)}, "
            f"contexts {_gb(memory.learner_contexts)}",
            *self._saving_lines(),
            *self._adapter_lines(),
            f"generator     weights {_gb(theirs.weights)}, forward pass {_gb(theirs.activations)}, "
            f"cache {_gb(theirs.cache)}, contexts {_gb(memory.generator_contexts)}"
            + (f", learner keeps {_gb(mine.kept)}" if memory.shared else "")
            + f" of {_gb(memory.generator_device)}: {self.sequences} sequences at a time",
        ]


def _ways(load: LearnerLoad) -> str:
    """How a rank computes, in words."""
    layers = "computed again in the backward pass" if load.recompute else "kept"
    layers += ", from inputs that wait on the host" if load.offload else ""
    reduced = "once a step" if load.reduce_once else "in every micro-batch"
    return f"activations are {layers}" + (
        f"; gradients reduced {reduced}" if load.shards > 1 else ""
    )


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
    from common.record.parts import learnt
    from common.record.trajectory_log import read_log
    from common.record.turns import sampled_lengths

    groups = map(learnt, read_log(run / "trajectories"))
    pool = [int(n) for group in groups for n in sampled_lengths(group)]
    if not pool:
        raise UserError(f"{run} has no completions in its trajectory log: give one that trained")
    return measured_lengths(pool)


def learner_pools(devices: int, per_node: int) -> list[int]:
    """Numbers of ranks that leave generators some of `devices`.

    Within a node they are powers of two; of several nodes, whole ones.
    """
    if devices > per_node:
        return list(range(per_node, devices, per_node))
    return [2**k for k in range(devices.bit_length()) if 2**k < devices]


def _nodes(devices: int, per_node: int) -> int:
    return -(-devices // per_node)


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB"
