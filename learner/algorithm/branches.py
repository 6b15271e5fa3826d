"""Advantages from measured values: what the reward expects before and behind each segment.

V(s) is the mean reward of continuations from the prefix s (`common.record.parts`). Branches cut a
completion into segments; the value behind the last is the reward itself. Every token of a segment
has

    A = V(end of the segment) - V(its start)          VinePPO, arXiv 2410.01679 [P]; SPO, 2505.23564

so the advantages of the segments add up to R - V(s_0) [D]. A branch that no verifier could judge
is none: its neighbours are one segment.

Legend: B completions, N all tokens. Evidence: [P] paper, [D] derived.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from common.config.algorithm import AdvantageConfig
from common.config.bounds import PositiveShare
from learner.algorithm.advantage_inputs import AdvantageInputs, TokenAdvantages, without_sure


def branch_values(
    inputs: AdvantageInputs, config: AdvantageConfig, *, zero_above: PositiveShare = 1.0
) -> TokenAdvantages:
    """The step of the measured value over each segment.

    A completion without a branch has its own advantage. Where the first value is not that of the
    start, the mean reward of the group stands for V(s_0). Tokens that were sampled with a
    probability above `zero_above` get nothing (SPO: 0.9) [P]; they still count in denominators.
    """
    tokens, axis = inputs.tokens, inputs.tokens.axis
    advantages_N = axis.spread(inputs.advantages_B).clone()
    if tokens.branches is not None:
        starts_B = _mean_rewards(inputs)
        parts = advantages_N.split(axis.lengths_B.tolist())  # views, a completion each
        known = tokens.branches
        for completion in known.completion_V.unique().tolist():
            own = known.completion_V == completion
            reward = float(inputs.rewards_B[completion])
            if math.isnan(reward):
                continue
            steps = value_steps(
                known.at_V[own].tolist(),
                known.values_V[own].tolist(),
                start=float(starts_B[completion]),
                reward=reward,
                length=len(parts[completion]),
            )
            parts[completion].copy_(steps)
    return TokenAdvantages(without_sure(advantages_N, tokens, zero_above))


def value_steps(
    at: list[int], values: list[float], *, start: float, reward: float, length: int
) -> Tensor:
    """The value step of each token's segment, [length] float64.

    Args:
        at: tokens before each branch, ascending.
        values: what each is worth.
        start: V(s_0), where no branch is at 0.
    """
    if at[:1] != [0]:
        at, values = [0, *at], [start, *values]
    edges = torch.tensor([*at, length])
    levels = torch.tensor([*values, reward], dtype=torch.float64)
    return levels.diff().repeat_interleave(edges.diff())


def _mean_rewards(inputs: AdvantageInputs) -> Tensor:
    """The mean reward of each completion's group, over those that count, [B] float64."""
    means_B = torch.zeros_like(inputs.rewards_B)
    for group in inputs.group_B.unique():
        own_B = inputs.group_B == group
        kept_B = own_B & inputs.kept_B
        if kept_B.any():
            means_B[own_B] = inputs.rewards_B[kept_B].mean()
    return means_B
