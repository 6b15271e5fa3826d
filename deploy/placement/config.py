"""What placement needs of a configuration: which actors there are, and how each is set up."""

from __future__ import annotations

from dataclasses import Field, replace
from typing import Any, ClassVar, Protocol

from common.config.sections import (
    AdapterConfig,
    DataConfig,
    EnvironmentConfig,
    GeneratorConfig,
    LearnerConfig,
    ModelConfig,
    PlacementConfig,
    RayConfig,
    TeacherConfig,
    VerifierConfig,
)
from common.weights.transport import WeightTransport


class ActorConfig(Protocol):
    """A dataclass with these sections: the `Config` of a run, or what an evaluation has instead."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    @property
    def model(self) -> ModelConfig: ...

    @property
    def generator(self) -> GeneratorConfig: ...

    @property
    def data(self) -> DataConfig: ...

    @property
    def environment(self) -> EnvironmentConfig: ...

    @property
    def verifier(self) -> VerifierConfig: ...

    @property
    def learner(self) -> LearnerConfig | None:
        """None: nothing is trained, so there is no learner and no weights travel."""
        ...

    @property
    def teacher(self) -> TeacherConfig: ...

    @property
    def transport(self) -> WeightTransport: ...

    @property
    def served_adapter(self) -> AdapterConfig | None:
        """The adapters with which generators sample; None where their weights are whole."""
        ...

    @property
    def placement(self) -> PlacementConfig: ...

    @property
    def ray(self) -> RayConfig: ...

    @property
    def seed(self) -> int: ...


def num_ranks(config: ActorConfig) -> int:
    """Ranks of the learner; 0 where there is none."""
    return 0 if config.learner is None else config.learner.ranks


def teacher_generator(config: ActorConfig) -> GeneratorConfig:
    """The generators that hold the teacher: one version of exact weights, and nothing sampled."""
    return replace(
        config.generator,
        count=config.teacher.count,
        min_count=None,
        max_staleness=0,
        quantization=None,
        tensor_parallel=config.teacher.tensor_parallel,
        pipeline_parallel=1,
        num_gpus=0.0,
        resources={},
        labels={},
    )


def teacher_names(config: ActorConfig) -> list[str]:
    """Names of the generators that hold the teacher, which are also those of their places."""
    return [f"teacher-{index}" for index in range(config.teacher.count)]
