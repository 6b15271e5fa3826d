"""Numbers that must not be trained on: gradients that are not finite, a sampler far away."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

from common.config.sections import LearnerConfig
from common.errors import NumbersError, RunError

log = logging.getLogger(__name__)


class GradientGuard:
    """Counts optimiser steps left out in a row; the same on every rank, as the norm is."""

    def __init__(self, config: LearnerConfig) -> None:
        self._limit = config.max_skipped_steps
        self._in_a_row = 0

    def allows(self, grad_norm: float, step: int) -> bool:
        """Whether the optimiser may take this step.

        Raises:
            NumbersError: too many in a row were not finite.
        """
        if math.isfinite(grad_norm):
            self._in_a_row = 0
            return True
        self._in_a_row += 1
        if self._in_a_row > self._limit:
            raise NumbersError(
                f"the gradient norm of learner step {step} is {grad_norm}, and "
                f"{self._limit} steps before it were left out for the same reason "
                "(learner.max_skipped_steps). Its groups are kept in failed-batch.arrow in the run "
                "directory; lower learner.learning_rate or learner.max_grad_norm, or look at the "
                "rewards, and go on from the last checkpoint by resume="
            )
        log.warning("learner step %d left out: its gradient norm is %s", step, grad_norm)
        return False


def check_logprob_gap(
    gap: float, step: int, config: LearnerConfig, warn: Callable[[str], None]
) -> None:
    """Warn, or end the run, where trainer and sampler are too far apart.

    Args:
        gap: mean |log pi - log mu| of a token in nats. Numerics and staleness both make it.

    Raises:
        RunError: it is beyond `learner.logprob_gap_stop`.
    """
    said = f"step {step}: sampler and trainer are {gap:.3f} nats a token apart"
    if gap > config.logprob_gap_stop or math.isnan(gap):
        raise RunError(
            f"{said} (learner.logprob_gap_stop={config.logprob_gap_stop:g}): what the generators "
            "sample is not this policy. Look at generator.max_staleness and quantization, at the "
            "learning rate, and at canary/gap in metrics.jsonl"
        )
    if gap > config.logprob_gap_warn:
        warn(f"warning: {said} (learner.logprob_gap_warn={config.logprob_gap_warn:g})")
