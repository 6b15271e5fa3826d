"""Which completions are kept, and rewards by length: hand-computed tables."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from maths_oracles import random, seeds

from common.config.algorithm import RolloutConfig
from learner.algorithm.selection import (
    Sampled,
    by_keys,
    max_variance_subset,
    overlong_penalty,
    prune_by_advantage,
)

NAN = float("nan")
GROUP = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])


def sampled(rewards: torch.Tensor, advantages=None, truncated=None) -> Sampled:
    nothing = torch.zeros(8, dtype=torch.bool)
    cut = nothing if truncated is None else truncated
    return Sampled(rewards, GROUP, torch.ones(8).long(), cut, ~rewards.isnan(), advantages)


def test_the_soft_punishment_by_hand() -> None:
    lengths = torch.tensor([0, 10, 12, 14, 16, 20])
    expected = torch.tensor([0.0, 0.0, 0.0, -0.5, -1.0, -1.0], dtype=torch.float64)
    assert torch.equal(overlong_penalty(lengths, limit=16, share=0.25), expected)
    assert not overlong_penalty(lengths, limit=16, share=0.0).any()


@pytest.mark.parametrize(
    ("limit", "share", "window"),
    [
        (20480, 0.2, 4096),
        (24, 0.2, 5),
        (48, 0.5, 24),
        (24, 2 / 24, 2),
        (24, 1.0, 24),
        (24, 0.01, 1),
    ],
)
def test_the_punished_window_is_a_whole_number_of_tokens(
    limit: int, share: float, window: int
) -> None:
    """DAPO's own, what the presets have of it, the edges; -1/window at its first token."""
    before, first, last = limit - window, limit - window + 1, limit
    found = overlong_penalty(torch.tensor([before, first, last]), limit, share).tolist()
    assert found == [0.0, -1 / window, -1.0]


def test_pods_keeps_the_extremes_of_each_group_and_never_the_unscored() -> None:
    rewards = torch.tensor([0.0, 0.5, 0.5, 1.0, NAN, 0.2, 0.9, 0.3], dtype=torch.float64)
    kept = by_keys(sampled(rewards), RolloutConfig(max_variance_share=0.5))
    assert kept.tolist() == [True, False, False, True, False, True, True, False]
    everyone = by_keys(sampled(rewards), RolloutConfig())
    assert everyone.tolist() == [True] * 4 + [False] + [True] * 3


def test_cppo_prunes_within_each_group_and_truncated_ones_go_last() -> None:
    advantages = torch.tensor([0.1, -2.0, 1.0, 0.2, 3.0, 0.5, -0.5, 0.0])
    truncated = torch.tensor([False, True] + [False] * 6)
    rewards = torch.zeros(8)
    pruned = by_keys(sampled(rewards, advantages), RolloutConfig(prune_rate=0.5))
    assert pruned.tolist() == [False, True, True, False, True, True, False, False]
    after = sampled(rewards, advantages, truncated)
    masked = by_keys(after, RolloutConfig(mask_truncated=True))
    assert masked.tolist() == [True, False] + [True] * 6
    assert by_keys(after, RolloutConfig()).all()


@given(seeds, st.integers(1, 8), st.integers(1, 8))
@settings(max_examples=40, deadline=None)
def test_pods_is_the_best_subset(seed: int, size: int, keep: int) -> None:
    """Against every subset of that size."""
    keep = min(keep, size)
    rewards_G = torch.randint(0, 4, (size,), generator=random(seed)).double()
    mask_G = max_variance_subset(rewards_G, keep)
    best = max(
        float(rewards_G[list(subset)].var(correction=0))
        for subset in itertools.combinations(range(size), keep)
    )
    assert int(mask_G.sum()) == keep
    assert float(rewards_G[mask_G].var(correction=0)) == pytest.approx(best, abs=1e-12)


def test_pods_needs_a_possible_number() -> None:
    for keep in (0, 4):
        with pytest.raises(ValueError, match="3 completions"):
            max_variance_subset(torch.zeros(3), keep)


def test_cppo_keeps_the_largest() -> None:
    advantages_G = torch.tensor([0.1, -2.0, 1.0, -1.0, 0.0])
    assert prune_by_advantage(advantages_G, 0.5).tolist() == [False, True, True, False, False]
    assert prune_by_advantage(advantages_G, 0.4).tolist() == [False, True, True, True, False]
    assert prune_by_advantage(advantages_G, 0.0).all()
    assert int(prune_by_advantage(torch.zeros(10), 0.9).sum()) == 1
    with pytest.raises(ValueError, match="pruning rate"):
        prune_by_advantage(advantages_G, 1.0)
