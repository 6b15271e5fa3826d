"""What placement needs of a configuration: which actors there are, and how each is set up."""

from __future__ import annotations

from dataclasses import Field
from typing import Any, ClassVar, Protocol

from common.config.sections import (
    GeneratorConfig,
    LearnerConfig,
    ModelConfig,
    PlacementConfig,
    RayConfig,
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
    def verifier(self) -> VerifierConfig: ...

    @property
    def learner(self) -> LearnerConfig | None:
        """None: nothing is trained, so there is no learner and no weights travel."""
        ...

    @property
    def transport(self) -> WeightTransport: ...

    @property
    def placement(self) -> PlacementConfig: ...

    @property
    def ray(self) -> RayConfig: ...

    @property
    def seed(self) -> int: ...


def num_ranks(config: ActorConfig) -> int:
    """Ranks of the learner; 0 where there is none."""
    return 0 if config.learner is None else config.learner.ranks
