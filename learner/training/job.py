"""What a run asks of the learner."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from common.config.algorithm import AlgorithmConfig
from common.config.sections import LearnerConfig, ModelConfig
from common.weights.object_store import ObjectStore
from common.weights.registry import PublishName


@dataclass(frozen=True)
class LearnerJob:
    """Settings of the learner that are the same on every rank."""

    model: ModelConfig
    reference_path: str | None
    """Folder of the model that the run began from, also after a resume. It is the reference policy,
    and the frozen part of one that is trained by adapters; None where there is neither."""
    learner: LearnerConfig
    algorithm: AlgorithmConfig
    correction_kind: str
    max_completion_tokens: int
    temperature: float
    """Sampling temperature. Log-probabilities in the loss are taken at it."""
    seed: int
    total_steps: int
    """Learner steps of the run, for the learning-rate schedule."""
    primary_verifier: str
    """Name used in errors about rewards."""
    bucket_mib: int
    """Largest bucket of `export_weights`, MiB."""
    tokens_per_microbatch: int
    """Token budget of a packed row (`batch.tokens_per_microbatch`)."""
    teacher_path: str | None = None
    """Folder of the teacher; None where there is none."""
    teacher_parameters: int = 0
    teacher_offload: bool = False
    """Whether the teacher's weights wait on the host between its passes."""
    scores_on_record: bool = False
    """Whether steps are given what their scorer said, as in a replay: no scorer is loaded then."""
    reward_weights: Mapping[str, float] = field(default_factory=dict)
    """Weight of every verifier in the reward, by its name."""
    transport: str = ObjectStore.name
    """Name of the weight transport."""
    publish: PublishName = "merged"
    """Whether adapters travel merged into the weights, or alone."""
    checkpoint_timeout_s: float = 900.0
    """For one rank to wait for the others while a checkpoint is written."""

    @property
    def trained_path(self) -> str:
        """Folder that the learner reads. After a resume `model` holds merged weights, and adapters
        stand beside those that the run began from."""
        if not self.model.adapter.rank:
            return self.model.path
        assert self.reference_path is not None
        return self.reference_path
