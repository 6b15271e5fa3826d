"""The packing plan: a partition, within budget, balanced, the same on every rank."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from learner_models import random_groups, trajectories

from learner.policy.packing import PackingPlan, pack_microbatch, pack_row, plan_packing
from learner.policy.step_batch import StepBatch

_SHAPES = st.lists(
    st.tuples(st.integers(1, 30), st.lists(st.integers(1, 40), min_size=1, max_size=6)),
    min_size=1,
    max_size=5,
)


def _plan(batch: StepBatch, trained=None, ranks=1, budget=64, share=True) -> PackingPlan:
    chosen = np.ones(len(batch.group_B), bool) if trained is None else np.array(trained)
    return plan_packing(
        batch, chosen, ranks=ranks, budget=budget, share_prefix=share, pairs_per_token=384.0
    )


def _segments(plan: PackingPlan):
    return [s for rank in plan.microbatches for members in rank for s in members]


@settings(max_examples=60, deadline=None)
@given(
    shapes=_SHAPES,
    ranks=st.integers(1, 3),
    budget=st.integers(8, 200),
    share=st.booleans(),
    seed=st.integers(0, 9),
)
def test_plan_is_a_partition_within_budget(shapes, ranks, budget, share, seed) -> None:
    batch = StepBatch.from_record_batches(trajectories(shapes))
    trained = np.random.default_rng(seed).random(len(batch.group_B)) < 0.7
    plan = _plan(batch, trained, ranks, budget, share)
    planned = sorted(c for s in _segments(plan) for c in s.completions)
    assert planned == np.flatnonzero(trained).tolist()
    assert len({len(rank) for rank in plan.microbatches}) == 1
    for members in (m for rank in plan.microbatches for m in rank):
        alone = len(members) == 1 and len(members[0].completions) == 1
        assert sum(s.tokens for s in members) <= budget or alone
    for segment in _segments(plan):
        assert {int(batch.group_B[c]) for c in segment.completions} == {segment.prompt}
        assert share or len(segment.completions) == 1


def test_a_group_shares_its_prompt_and_a_large_group_repeats_it() -> None:
    batch = StepBatch.from_record_batches(trajectories([(10, [5] * 4)]))
    assert [s.tokens for s in _segments(_plan(batch, budget=30))] == [30]
    assert [s.tokens for s in _segments(_plan(batch, budget=29))] == [20, 20]
    assert [s.tokens for s in _segments(_plan(batch, budget=30, share=False))] == [15] * 4


def test_an_oversized_completion_is_alone() -> None:
    batch = StepBatch.from_record_batches(trajectories([(10, [50, 2]), (4, [4])]))
    plan = _plan(batch, budget=32)
    by_size = sorted(sum(s.tokens for s in members) for members in plan.microbatches[0])
    assert by_size == [20, 60]
    assert plan.efficiency == 1.0  # one rank waits for nobody


def test_one_group_is_split_so_that_no_rank_idles() -> None:
    batch = StepBatch.from_record_batches(trajectories([(4, [10] * 8)]))
    plan = _plan(batch, ranks=2, budget=4096)
    assert [len(rank[0][0].completions) for rank in plan.microbatches] == [4, 4]


def test_ranks_without_work_get_empty_microbatches() -> None:
    batch = StepBatch.from_record_batches(trajectories([(4, [3])]))
    plan = _plan(batch, ranks=3)
    assert [len(rank[0]) for rank in plan.microbatches] == [1, 0, 0]
    assert plan.efficiency == pytest.approx(1 / 3)
    assert _plan(batch, trained=[False], ranks=3).microbatches == ((), (), ())


def test_load_is_balanced() -> None:
    shapes = [(20, [n, n, n]) for n in range(5, 45)]
    batch = StepBatch.from_record_batches(trajectories(shapes))
    plan = _plan(batch, ranks=4, budget=400)
    loads = [sum(s.cost(384.0) for s in m) for rank in plan.microbatches for m in rank]
    # Graham's bound for LPT; the optimum is at least the mean and at least the largest segment.
    optimum = max(sum(loads) / len(loads), *(s.cost(384.0) for s in _segments(plan)))
    assert max(loads) <= (4 / 3 - 1 / (3 * len(loads))) * optimum
    rounds = zip(
        *[[sum(s.cost(384.0) for s in m) for m in r] for r in plan.microbatches], strict=True
    )
    assert plan.efficiency == pytest.approx(sum(loads) / (4 * sum(max(r) for r in rounds)))
    assert plan.efficiency > 0.95


def test_row_positions_labels_and_predictors() -> None:
    groups = random_groups([(3, [2, 1]), (2, [2])])
    row = pack_row(groups, [4, 7, 1], "cpu")
    assert row.position_ids_1T.tolist() == [[0, 1, 2, 3, 4, 3, 0, 1, 2, 3]]
    assert row.predictor_rows_M.tolist() == [2, 3, 2, 7, 8]
    tokens = [t for _, completions in groups for c in completions for t in c.tolist()]
    assert row.labels_M.tolist() == tokens
    assert row.lengths == (2, 1, 2) and row.completions == (4, 7, 1)


def test_microbatch_carries_the_tokens_of_the_log() -> None:
    shapes = [(3, [2, 6]), (5, [4, 1, 3])]
    batch = StepBatch.from_record_batches(trajectories(shapes, seed=5))
    groups = random_groups(shapes, seed=5)
    flat = [c for _, completions in groups for c in completions]
    for members in _plan(batch, budget=12).microbatches[0]:
        row = pack_microbatch(batch, members, "cpu")
        expected = np.concatenate([flat[c] for c in row.completions])
        assert torch.equal(row.labels_M, torch.from_numpy(expected))


def test_sliced_and_null_columns_are_read_right() -> None:
    rewards = [[1.0, None, 0.0], [None, 1.0, 1.0]]
    whole = trajectories([(3, [2, 6, 1]), (5, [4, 1, 3])], rewards=rewards)
    sliced = StepBatch.from_record_batches([whole[0].slice(1, 2), whole[1].slice(0, 1)])
    assert sliced.lengths_B.tolist() == [6, 1, 4]
    assert np.isnan(sliced.rewards_B).tolist() == [True, False, True]
    full = StepBatch.from_record_batches(whole)
    assert np.array_equal(sliced.token_ids[:7], full.token_ids[2:9])
    assert np.array_equal(sliced.trained_lengths_B, sliced.lengths_B)


def test_a_completion_without_tokens_is_predicted_by_nothing() -> None:
    prompt, answer = np.array([5, 6]), np.array([7, 8])
    with_empty = pack_row([(prompt, [answer[:0]]), (prompt, [answer])], range(2), "cpu")
    assert with_empty.lengths == (0, 2)
    assert with_empty.predictor_rows_M.tolist() == [3, 4]
    assert with_empty.labels_M.tolist() == [7, 8]
