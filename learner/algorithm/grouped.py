"""Rewards of a batch by group, and what a baseline makes of them.

Legend: V completions with a reward, P groups.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class RewardPart:
    """What one verifier gave the completions, or a penalty."""

    values: Tensor  # float64, one a completion
    weight: float


@dataclass(frozen=True)
class GroupedRewards:
    """Rewards with the group of each, and the statistics of the groups spread back to members."""

    rewards_V: Tensor
    group_V: Tensor
    lengths_V: Tensor
    """All tokens of each completion, long."""
    parts: tuple[RewardPart, ...] = ()
    """What `rewards_V` is the weighted sum of; nothing where that is not known."""
    scores_V: Tensor | None = None
    """Mean log-probability of each completion's tokens under the policy that sampled them."""
    compared_V: Tensor | None = None
    """Whether the completion is there for others to compare with alone, bool."""

    @cached_property
    def groups(self) -> int:
        """Number of groups."""
        return int(self.group_V.max()) + 1 if self.group_V.numel() else 0

    def sum(self, values_V: Tensor) -> Tensor:
        """Sum of `values_V` over the group of each member."""
        zeros_P = values_V.new_zeros(self.groups)
        return zeros_P.index_add(0, self.group_V, values_V)[self.group_V]

    @cached_property
    def size_V(self) -> Tensor:
        """Completions with a reward in the group of each member, float64."""
        return self.sum(torch.ones_like(self.rewards_V))

    @cached_property
    def uniform_V(self) -> Tensor:
        """True in groups whose rewards are all equal, groups of one included."""
        empty_P = self.rewards_V.new_zeros(self.groups)
        ends = [
            empty_P.scatter_reduce(0, self.group_V, self.rewards_V, how, include_self=False)
            for how in ("amin", "amax")
        ]
        return (ends[0] == ends[1])[self.group_V]

    @cached_property
    def mean_V(self) -> Tensor:
        """Mean reward in the group of each member."""
        return self.sum(self.rewards_V) / self.size_V

    @cached_property
    def deviation_V(self) -> Tensor:
        """Sample standard deviation of the group of each member, 0 in a group of one."""
        variance_V = self.sum(self.centred_V**2) / (self.size_V - 1).clamp(min=1)
        return variance_V.sqrt()

    @cached_property
    def centred_V(self) -> Tensor:
        """Rewards less the mean of their group: exactly 0 in uniform groups, without rounding."""
        return (self.rewards_V - self.mean_V).masked_fill(self.uniform_V, 0.0)


@dataclass(frozen=True)
class Advantages:
    """What a baseline makes of the rewards."""

    advantages_V: Tensor  # float64
    kept_V: Tensor | None = None
    """Which completions count, bool; None for all. The others count in no denominator."""
    metrics: Mapping[str, float] = field(default_factory=dict)


def deviation(values_V: Tensor) -> Tensor:
    """Sample standard deviation; 0 for fewer than two values."""
    return values_V.std() if values_V.numel() > 1 else values_V.new_zeros(())
