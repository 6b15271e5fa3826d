"""Aggregations: each reduction as its paper states it, and the learnable length preference."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from maths_oracles import normal, random, seeds

from common.config.algorithm import AggregationConfig
from learner.algorithm.aggregation import (
    AGGREGATIONS,
    KeptCompletions,
    LambdaGrpo,
    length_preference,
)

LENGTHS = torch.tensor([2, 4, 6, 8, 8, 8])
GROUPS = torch.tensor([0, 0, 0, 1, 1, 1])


def weights(kind: str, lengths=LENGTHS, groups=GROUPS, **options) -> torch.Tensor:
    config = AggregationConfig(kind=kind, **options)
    return AGGREGATIONS.rule(config)(kept(lengths, groups)).weights_V


def kept(lengths: torch.Tensor, groups: torch.Tensor) -> KeptCompletions:
    return KeptCompletions(lengths, groups, torch.ones(len(lengths)), 10)


def test_reductions_as_stated() -> None:
    """Against mean-of-means, sum over all tokens, and sum over the constant."""
    losses_BT = [normal(n, random(n + i)) for i, n in enumerate(LENGTHS.tolist())]
    sums_B = torch.stack([loss.sum() for loss in losses_BT])
    expected = {
        "sequence_mean": torch.stack([loss.mean() for loss in losses_BT]).mean(),
        "token_mean": torch.cat(losses_BT).mean(),
        "constant": sums_B.sum() / (6 * 10),
        "lambda_grpo": torch.cat(losses_BT).mean(),  # at lambda = 0
    }
    for kind, value in expected.items():
        torch.testing.assert_close((weights(kind) * sums_B).sum(), value)


def test_empty_completions_and_batches() -> None:
    lengths = torch.tensor([0, 3])
    for kind in ("sequence_mean", "token_mean", "constant", "lambda_grpo"):
        assert weights(kind, lengths, GROUPS[:2]).isfinite().all()
        assert weights(kind, lengths[:1], GROUPS[:1]).isfinite().all()
        assert weights(kind, lengths[:0], GROUPS[:0]).numel() == 0
    assert weights("sequence_mean", lengths, GROUPS[:2])[1] == 1 / 6


@given(st.lists(st.integers(0, 100), min_size=1, max_size=40), st.floats(-3, 3), seeds)
@settings(max_examples=60, deadline=None)
def test_preference_sums_to_the_group_size(sizes: list[int], lambda_: float, seed: int) -> None:
    lengths = torch.tensor(sizes)
    groups = torch.randint(0, 4, (len(sizes),), generator=random(seed))
    preference, derivative = length_preference(lengths, groups, lambda_, 1 / 9)
    for group in groups.unique():
        inside = groups == group
        assert float(preference[inside].sum()) == pytest.approx(int(inside.sum()))
        assert float(derivative[inside].sum()) == pytest.approx(0, abs=1e-9)
        if lengths[inside].unique().numel() == 1:
            assert preference[inside].tolist() == pytest.approx([1.0] * int(inside.sum()))
            assert derivative[inside].abs().max() < 1e-12


@given(st.lists(st.integers(0, 500), min_size=1, max_size=40), st.integers(1, 5), seeds)
@settings(max_examples=60, deadline=None)
def test_zero_is_token_mean_exactly(sizes: list[int], num_groups: int, seed: int) -> None:
    """At lambda = 0 the learnable preference is DAPO's reduction, to the last bit."""
    groups = torch.randint(0, num_groups, (len(sizes),), generator=random(seed))
    lengths = torch.tensor(sizes)
    assert torch.equal(
        weights("lambda_grpo", lengths, groups), weights("token_mean", lengths, groups)
    )


def test_preference_by_hand() -> None:
    """Lengths 2 and 4: z = -1, 1; h = 8/9, 10/9; lambda = 1 gives g = h."""
    preference, _ = length_preference(LENGTHS[:2], GROUPS[:2], 1.0, 1 / 9)
    low, high = math.exp(8 / 9), math.exp(10 / 9)
    assert preference.tolist() == pytest.approx([2 * low / (low + high), 2 * high / (low + high)])


@pytest.mark.parametrize("lambda_", [-2.0, 2.0])
def test_sign_of_lambda_is_the_taste_for_length(lambda_: float) -> None:
    preference, _ = length_preference(LENGTHS[:3], GROUPS[:3], lambda_, 1 / 9)
    ordered = preference if lambda_ > 0 else preference.flip(0)
    assert (ordered.diff() > 0).all()


@given(seeds, st.floats(-3, 3))
@settings(max_examples=40, deadline=None)
def test_derivative_is_autograd(seed: int, lambda_: float) -> None:
    generator = random(seed)
    lengths = torch.randint(1, 50, (8,), generator=generator)
    sums = normal(8, generator)
    leaf = torch.tensor(lambda_, dtype=torch.float64, requires_grad=True)
    size = lengths.double()
    z = (size - size.mean()) / size.std(correction=0).clamp(min=1e-12)
    f = 8 * ((1 + z / 9) ** leaf).softmax(0)
    loss = -(f * sums).sum() / size.sum()
    loss.backward()
    learned = LambdaGrpo(AggregationConfig(kind="lambda_grpo", lambda_init=lambda_))
    groups = torch.zeros(8, dtype=torch.long)
    batch = kept(lengths, groups)
    torch.testing.assert_close((learned(batch).weights_V * sums).sum(), -loss.detach())
    assert learned.gradient(batch, sums) == pytest.approx(float(leaf.grad), abs=1e-12)


def test_up_to_81_completions_need_no_clamp() -> None:
    """One short answer among long ones is the extreme case: h = 1 - sqrt(G - 1) / 9."""
    for size, clamped in ((81, False), (83, True), (200, True)):
        lengths = torch.tensor([1] + [2] * (size - 1))
        groups = torch.zeros(size, dtype=torch.long)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            preference, derivative = length_preference(lengths, groups, -0.5, 1 / 9)
        assert any("clamped" in str(each.message) for each in caught) == clamped
        assert preference.isfinite().all()
        assert derivative.isfinite().all()


def test_a_lambda_under_which_one_answer_carries_its_group_is_said() -> None:
    """Lengths 100 to 700 and 1500 at lambda = 10: the longest has nearly all."""
    lengths = torch.tensor([100, 200, 300, 400, 500, 600, 700, 1500])
    groups = torch.zeros(8, dtype=torch.long)
    for lambda_, said in ((1.0, False), (10.0, True)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            preference, _ = length_preference(lengths, groups, lambda_, 1 / 9)
        assert any("more than half" in str(each.message) for each in caught) == said
    assert float(preference[-1]) == pytest.approx(7.99, abs=0.01)


@pytest.mark.filterwarnings("ignore:lambda_grpo")
def test_a_runaway_lambda_stays_finite() -> None:
    for lambda_ in (-1e6, 1e6):
        for values in length_preference(LENGTHS, GROUPS, lambda_, 1 / 9):
            assert values.isfinite().all()


def test_lambda_is_state() -> None:
    learned = LambdaGrpo(AggregationConfig(kind="lambda_grpo", lambda_learning_rate=1.0))
    sums = torch.tensor([1.0, 0.0, -1.0, 0.0, 0.0, 0.0])  # short answers good: lambda falls
    metrics = learned.end_step(kept(LENGTHS, GROUPS), sums)
    assert metrics["lambda_grpo/lambda"] == learned.lambda_ < 0
    restored = LambdaGrpo(AggregationConfig(kind="lambda_grpo"))
    restored.load_state_dict(learned.state_dict())
    assert restored.lambda_ == learned.lambda_
