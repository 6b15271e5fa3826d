"""GRPO-CARE's bonus: who earns it, and that nobody wrong does."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from learner_models import trajectories

from common.config.algorithm import ConsistencyConfig
from learner.policy.step_batch import StepBatch
from learner.training.consistency import bonuses, consistency, with_consistency_bonus

CARE = ConsistencyConfig(weight=0.5)


def of_group(consistent: list[float], accuracy: list[float]) -> list[float]:
    group_B = np.zeros(len(accuracy), np.int64)
    return bonuses(np.array(consistent), np.array(accuracy), group_B, CARE).tolist()


def test_right_answers_earn_it_that_are_as_consistent_as_their_like() -> None:
    # The mean of the three right ones is 0.6: 0.59 is within the margin, 0.3 is not.
    assert of_group([0.91, 0.59, 0.3, 0.95], [1, 1, 1, 0]) == [0.5, 0.5, 0.0, 0.0]


def test_who_has_no_answer_earns_none_and_is_in_no_mean() -> None:
    nan = float("nan")
    assert of_group([nan, 0.2, 0.9], [1, 1, 0]) == [0.0, 0.5, 0.0]
    assert of_group([0.9, 0.8], [0, 0]) == [0.0, 0.0]
    assert of_group([0.9, 0.8], [nan, nan]) == [0.0, 0.0]


@given(st.lists(st.tuples(st.floats(0.0, 1.0), st.booleans()), min_size=2, max_size=8))
def test_no_wrong_answer_is_lifted_over_a_right_one(group: list[tuple[float, bool]]) -> None:
    accuracy = [float(right) for _, right in group]
    earned = of_group([c for c, _ in group], accuracy)
    totals = [a + e for a, e in zip(accuracy, earned, strict=True)]
    wrong = [total for total, (_, right) in zip(totals, group, strict=True) if not right]
    right = [total for total, (_, right) in zip(totals, group, strict=True) if right]
    assert max(wrong, default=0.0) == 0.0
    assert min(right, default=1.0) >= 1.0


def test_consistency_is_the_mean_probability_of_the_answers_tokens() -> None:
    batch = StepBatch.from_record_batches(trajectories([(4, [3, 2, 2])]))
    scores = np.log(np.array([0.5, 0.2, 0.8, 0.99, 0.99, 0.1, 0.1], np.float32))
    spans = np.array([[1, 3], [0, 2], [0, 0]])
    batch = replace(batch, scores=scores, answers_B2=spans)
    found = consistency(batch, cap=0.95)
    assert found[:2] == pytest.approx([0.4, 0.95])
    assert np.isnan(found[2])
    rewarded, metrics = with_consistency_bonus(batch, CARE)
    gained = rewarded.rewards_B - batch.rewards_B
    assert metrics["reward/consistency_bonus"] == gained.mean()
    assert gained.tolist() == [0.0, 0.5, 0.0]  # the second alone is right
