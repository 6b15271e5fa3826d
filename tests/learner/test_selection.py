"""Which completions are kept, and rewards by length: hand-computed tables."""

from __future__ import annotations

import torch

from common.config.algorithm import RolloutConfig
from learner.algorithm.selection import keep_after, keep_before, overlong_penalty

NAN = float("nan")
GROUP = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])


def test_the_soft_punishment_by_hand() -> None:
    lengths = torch.tensor([0, 10, 12, 14, 16, 20])
    expected = torch.tensor([0.0, 0.0, 0.0, -0.5, -1.0, -1.0], dtype=torch.float64)
    assert torch.equal(overlong_penalty(lengths, limit=16, window=4), expected)
    assert not overlong_penalty(lengths, limit=16, window=0).any()


def test_pods_keeps_the_extremes_of_each_group_and_never_the_unscored() -> None:
    rewards = torch.tensor([0.0, 0.5, 0.5, 1.0, NAN, 0.2, 0.9, 0.3], dtype=torch.float64)
    kept = keep_before(rewards, GROUP, RolloutConfig(keep_max_variance=2))
    assert kept.tolist() == [True, False, False, True, False, True, True, False]
    everyone = keep_before(rewards, GROUP, RolloutConfig())
    assert everyone.tolist() == [True] * 4 + [False] + [True] * 3


def test_cppo_prunes_within_each_group_and_truncated_ones_go_last() -> None:
    advantages = torch.tensor([0.1, -2.0, 1.0, 0.2, 3.0, 0.5, -0.5, 0.0])
    kept = torch.ones(8, dtype=torch.bool)
    truncated = torch.tensor([False, True] + [False] * 6)
    nothing = torch.zeros(8, dtype=torch.bool)
    pruned = keep_after(advantages, GROUP, kept, nothing, RolloutConfig(prune_rate=0.5))
    assert pruned.tolist() == [False, True, True, False, True, True, False, False]
    masked = keep_after(advantages, GROUP, kept, truncated, RolloutConfig(mask_truncated=True))
    assert masked.tolist() == [True, False] + [True] * 6
    assert keep_after(advantages, GROUP, kept, truncated, RolloutConfig()).all()
