"""The learning rate of a run's steps."""

from __future__ import annotations

import math

from common.config.sections import LearnerConfig


def learning_rate(config: LearnerConfig, step: int, total_steps: int, held: int = 0) -> float:
    """Learning rate of 0-based `step`: linear warm-up, then constant or decay to 0.

    It is 0 in the first `held` steps, behind which the warm-up begins.
    """
    step, total_steps = step - held, total_steps - held
    if step < 0:
        return 0.0
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    progress = min(progress, 1.0)
    if config.schedule == "linear":
        return config.learning_rate * (1.0 - progress)
    if config.schedule == "cosine":
        return config.learning_rate * 0.5 * (1.0 + math.cos(math.pi * progress))
    return config.learning_rate
