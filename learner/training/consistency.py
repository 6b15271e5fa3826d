"""GRPO-CARE's bonus, arXiv 2506.16141: right answers that follow from what was said before them.

c_i is the probability of an answer's tokens under the scorer, behind the completion's own words:
exp of their mean log-probability, at most `cap`. Eligible are completions whose accuracy is above
`accuracy` and at least their group's mean. One of them with c_i >= mean of eligible c - margin
earns weight * accuracy besides [P]. So a wrong answer earns nothing.

Shapes: B completions of the step.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from common.config.algorithm import ConsistencyConfig
from learner.policy.step_batch import StepBatch

Floats = npt.NDArray[np.float64]


def consistency(batch: StepBatch, cap: float) -> Floats:
    """Probability of each completion's answer under the scorer, [B]; NaN where there is none."""
    assert batch.scores is not None
    found = np.full(len(batch.group_B), np.nan)
    if batch.answers_B2 is None:
        return found
    for completion, (begin, end) in enumerate(batch.answers_B2.tolist()):
        said = batch.scores[batch.tokens_of(completion)][begin:end].astype(np.float64)
        if len(said):
            found[completion] = min(float(np.exp(said.mean())), cap)
    return found


def bonuses(
    consistency_B: Floats,
    accuracy_B: Floats,
    group_B: npt.NDArray[np.int64],
    config: ConsistencyConfig,
) -> Floats:
    """What each completion earns besides, [B]."""
    bonus_B = np.zeros(len(group_B))
    for group in np.unique(group_B):
        judged_B = (group_B == group) & ~np.isnan(accuracy_B)
        if not judged_B.any():
            continue
        mean = accuracy_B[judged_B].mean()
        eligible_B = judged_B & (accuracy_B > config.accuracy) & (accuracy_B >= mean)
        eligible_B &= ~np.isnan(consistency_B)
        if eligible_B.any():
            least = consistency_B[eligible_B].mean() - config.margin
            earned_B = eligible_B & (np.nan_to_num(consistency_B, nan=-1.0) >= least)
            bonus_B[earned_B] = config.weight * accuracy_B[earned_B]
    return bonus_B


def with_consistency_bonus(
    batch: StepBatch, config: ConsistencyConfig
) -> tuple[StepBatch, dict[str, float]]:
    """`batch` with the bonus in its rewards, and how much it is in the mean."""
    consistency_B = consistency(batch, config.cap)
    bonus_B = bonuses(consistency_B, batch.accuracy_B, batch.group_B, config)
    known = consistency_B[~np.isnan(consistency_B)]
    metrics = {
        "reward/consistency_bonus": float(bonus_B.mean()),
        "scorer/consistency": float(known.mean()) if len(known) else 0.0,
    }
    # No verifier has a space in its name.
    parts = batch.parts and {**batch.parts, "consistency bonus": bonus_B}
    return replace(batch, rewards_B=batch.rewards_B + bonus_B, parts=parts), metrics
