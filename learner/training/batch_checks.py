"""Metrics of a step that follow from its data alone.

Shapes: B completions of the step.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from common.errors import RunError
from learner.algorithm.prepared import Prepared
from learner.policy.step_batch import StepBatch


def describe(batch: StepBatch, prepared: Prepared) -> dict[str, float]:
    """Metrics of the data alone. Completions without a reward count in no mean of rewards."""
    compared_B = batch.compared_B
    rewarded_B = ~np.isnan(batch.rewards_B) & ~compared_B
    # Those that the recipe left out, pruned or cut short, are not among them.
    idle_B = prepared.kept_B.numpy() & ~prepared.has_advantage_B.numpy()
    trained_B = prepared.trained_B.numpy()
    greedy = batch.rewards_B[compared_B & ~np.isnan(batch.rewards_B)]
    joined = {}
    if batch.trees is not None:
        joined["completions/joined"] = float((batch.trees.parent_B >= 0).sum())
    return {
        **joined,
        **({"reward/greedy": _mean(greedy)} if len(greedy) else {}),
        "reward/mean": _mean(batch.rewards_B[rewarded_B]),
        "reward/accuracy": _mean(batch.accuracy_B[~np.isnan(batch.accuracy_B) & ~compared_B]),
        "completion_length/mean": _mean(batch.sampled_lengths_B[~compared_B]),
        "completions/zero_advantage": float(idle_B.sum()),
        "tokens/trained": float(prepared.lengths_B.numpy()[trained_B].sum()),
    }


def check_staleness(batch: StepBatch, version: int, max_staleness: int) -> dict[str, float]:
    """Staleness of every token in the loss: learner's version minus the token's.

    Raises:
        RunError: a token is older than `max_staleness`, or from a version that does not exist yet.
    """
    staleness = version - batch.weight_versions[batch.loss_mask].astype(np.int64)
    if not len(staleness):
        return {"staleness/max": 0.0, "staleness/mean": 0.0}
    oldest, newest = int(staleness.max()), int(staleness.min())
    if oldest > max_staleness or newest < 0:
        raise RunError(
            f"the learner at version {version} got tokens of versions {version - oldest} to "
            f"{version - newest}; allowed are {version - max_staleness} to {version} "
            "(generator.max_staleness). The staleness budget must hold this bound: please report it"
        )
    return {"staleness/max": float(oldest), "staleness/mean": float(staleness.mean())}


def _mean(values: npt.NDArray[Any]) -> float:
    return float(values.mean()) if len(values) else 0.0
