"""Steps that must not be taken: gradients that are not finite, samples of another policy."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from learner_models import save_tiny_model, trajectories
from learner_ranks import SHAPES, weights, worker

from common.config.sections import LearnerConfig
from common.errors import RunError
from learner.training.guards import GradientGuard, check_logprob_gap


def test_only_steps_in_a_row_count() -> None:
    guard = GradientGuard(LearnerConfig(max_skipped_steps=2))
    assert [guard.allows(norm, 0) for norm in (1.0, math.nan, math.inf, 2.0, math.nan)] == [
        True,
        False,
        False,
        True,
        False,
    ]
    assert not guard.allows(math.nan, 6)
    with pytest.raises(RunError, match="step 7 is nan, and 2 steps before it were left out"):
        guard.allows(math.nan, 7)


def test_a_gap_warns_then_ends_the_run() -> None:
    said: list[str] = []
    config = LearnerConfig(logprob_gap_warn=0.1, logprob_gap_stop=0.5)
    check_logprob_gap(0.05, 1, config, said.append)
    assert said == []
    check_logprob_gap(0.2, 2, config, said.append)
    assert said == [
        "warning: step 2: sampler and trainer are 0.200 nats a token apart "
        "(learner.logprob_gap_warn=0.1)"
    ]
    for gap in (0.6, math.nan, math.inf):
        with pytest.raises(RunError, match="is not this policy"):
            check_logprob_gap(gap, 3, config, said.append)


def test_a_step_without_a_finite_gradient_moves_nothing_and_the_next_one_trains(
    tmp_path: Path,
) -> None:
    with worker(save_tiny_model(tmp_path), max_skipped_steps=1) as made:
        before = weights(made)
        shard = next(made.trainer.policy.model.parameters()).to_local().data
        value = float(shard[0, 0])
        shard[0, 0] = math.nan  # so is every log-probability then, and every gradient
        metrics = made.step(trajectories(SHAPES, seed=0), 0, 0)
        assert (metrics["steps/skipped"], math.isnan(metrics["grad_norm"])) == (1.0, True)
        shard[0, 0] = value
        after = weights(made)
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
        metrics = made.step(trajectories(SHAPES, seed=1), 0, 0)
        assert metrics["steps/skipped"] == 0.0
        assert np.isfinite(metrics["grad_norm"])
        after = weights(made)
        assert not any(torch.equal(after[name], tensor) for name, tensor in before.items())
        shard[0, 0] = math.nan
        made.step(trajectories(SHAPES, seed=2), 0, 0)
        with pytest.raises(RunError, match="learner step 4 is nan, and 1 steps before it"):
            made.step(trajectories(SHAPES, seed=3), 0, 0)
