"""What a run asks of the learner."""

from __future__ import annotations

from dataclasses import dataclass

from common.config.algorithm import AlgorithmConfig
from common.config.sections import LearnerConfig, ModelConfig
from common.weights.object_store import ObjectStore


@dataclass(frozen=True)
class LearnerJob:
    """Settings of the learner that are the same on every rank."""

    model: ModelConfig
    reference_path: str | None
    """Folder of the reference policy, where there is one. It is the model that the run began from,
    also after a resume."""
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
    transport: str = ObjectStore.name
    """Name of the weight transport."""
    checkpoint_timeout_s: float = 900.0
    """For one rank to wait for the others while a checkpoint is written."""
