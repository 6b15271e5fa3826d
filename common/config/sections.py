"""The configuration of a run: nested dataclasses are the schema, YAML and `key=value` fill them.

The last of these wins: the defaults here, the recipe, the preset or another YAML file, the command
line. An unknown key, a wrong type, a number out of its bound or an impossible combination raises
`UserError` before any process starts. Values that follow from others are properties, never keys.

`common.config.load` fills and checks it. A component is handed its own section only. All sections
can be imported from here.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from common.config.actors import GeneratorConfig, VerifierConfig, VerifierSpec
from common.config.algorithm import AlgorithmConfig
from common.config.bounds import Count, Seed
from common.config.data import (
    AdapterConfig,
    BatchConfig,
    DataConfig,
    DataSetConfig,
    DataSource,
    ModelConfig,
    PromptOrder,
    ReasoningGymConfig,
)
from common.config.environment import EnvironmentConfig
from common.config.learner import LearnerConfig, OptimizerConfig, TeacherConfig, WeightsConfig
from common.config.operation import (
    CheckpointConfig,
    EvalConfig,
    MetricsConfig,
    PlacementConfig,
    RayConfig,
    RestartConfig,
    SinkName,
)
from common.weights.registry import TRANSPORTS
from common.weights.transport import WeightTransport

__all__ = [
    "AdapterConfig",
    "BatchConfig",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "DataSetConfig",
    "DataSource",
    "EnvironmentConfig",
    "EvalConfig",
    "GeneratorConfig",
    "LearnerConfig",
    "MetricsConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PlacementConfig",
    "PromptOrder",
    "RayConfig",
    "ReasoningGymConfig",
    "RestartConfig",
    "SinkName",
    "TeacherConfig",
    "VerifierConfig",
    "VerifierSpec",
    "WeightsConfig",
]

_EIGHT_BITS = 0.4
"""Tolerance of the canary where generators are quantised. With int8 the right weights of SmolLM2
were 0.06 to 0.19 nats a token away, without one of its thirty layers 0.65. fp8 is not measured."""


@dataclass
class Config:
    """One run."""

    name: str | None = None
    """Name of the run and of its folder. Null is the time at which it starts."""
    runs_dir: str = "runs"
    """Folder in which runs have their folders."""
    resume: str | None = None
    """Folder of a run to go on with. `auto` goes on with the run called `name`, or begins it where
    there is none. A job that a cluster submits again then goes on by itself."""
    recipe: str | None = None
    """Recipe: a file of deploy/configs/recipes by its name, or any YAML file by its path."""
    seed: Seed = 0
    """Seed of the prompts and their order and, in a synchronous run, of the samples."""
    steps: Count = 30
    """Learner steps of the run."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    verifier: VerifierConfig = field(default_factory=VerifierConfig)
    environment: EnvironmentConfig = field(default_factory=EnvironmentConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    weights: WeightsConfig = field(default_factory=WeightsConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    restart: RestartConfig = field(default_factory=RestartConfig)
    placement: PlacementConfig = field(default_factory=PlacementConfig)
    ray: RayConfig = field(default_factory=RayConfig)

    @property
    def groups_per_step(self) -> int:
        """P, the groups that a learner step takes; CPPO's refill takes more than the batch says."""
        rollout, prompts = self.algorithm.rollout, self.batch.prompts_per_step
        return int(prompts / (1.0 - rollout.prune_rate) + 1e-9) if rollout.refill else prompts

    @property
    def transport(self) -> WeightTransport:
        """The weight transport, with its facts."""
        return TRANSPORTS[self.weights.transport]

    @property
    def served_adapter(self) -> AdapterConfig | None:
        """The adapters with which generators sample; None where they are sent whole weights."""
        return self.model.adapter if self.weights.publish == "adapter" else None

    @property
    def completions_per_step(self) -> int:
        """Completions that a learner step takes; the most, where groups are trees."""
        follow_up = self.algorithm.rollout.follow_up
        return self.groups_per_step * follow_up.most_learnt(self.batch.group_size)

    @property
    def max_groups_in_flight(self) -> int:
        """The staleness budget, (S + 1) * P."""
        return (self.generator.max_staleness + 1) * self.groups_per_step

    @property
    def sampling_seed(self) -> int | None:
        """Seed of what a synchronous run samples; None leaves it to the engines' random state."""
        return self.seed if self.generator.max_staleness == 0 else None

    @property
    def verify_timeout_s(self) -> float:
        """Seconds for the verdicts on a group; all groups in flight may queue for one verifier."""
        follow_up = self.algorithm.rollout.follow_up
        verdicts = follow_up.most_of(self.batch.group_size) * len(self.verifier.rules)
        return 60.0 + self.verifier.timeout_s * verdicts * self.max_groups_in_flight

    @property
    def canary_tolerance(self) -> float:
        """Largest gap of the canary in nats a token, by default that of the number types."""
        if self.weights.canary_tolerance is not None:
            return self.weights.canary_tolerance
        if self.generator.quantization is not None:
            return _EIGHT_BITS
        return 1e-3 if self.model.dtype == "float32" else 0.2

    @property
    def correction_kind(self) -> str:
        """Off-policy correction, with `auto` resolved."""
        kind = self.algorithm.correction.kind
        if kind != "auto":
            return kind
        if self.algorithm.objective.anchor == "behaviour":
            return "none"
        apart = self.generator.max_staleness > 0 or self.generator.quantization is not None
        return "tis" if apart else "none"
