"""What a rule of the advantage axis is given of a step, and what it returns.

Legend: B completions, U turns, N all tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from learner.algorithm.rewarded import StepTokens, Turns


@dataclass(frozen=True)
class AdvantageInputs:
    """What a rule sees of a step."""

    advantages_B: Tensor  # float64, 0 where the completion does not count
    rewards_B: Tensor  # float64, as the baseline was given them; NaN where there is none
    group_B: Tensor  # long
    kept_B: Tensor  # bool, whether the completion counts
    tokens: StepTokens
    baseline: Callable[[Tensor, Tensor, Tensor], Tensor]
    """The recipe's baseline: (values, groups, lengths) of any things that are compared -> their
    advantages, float64. A group is compared with itself."""
    step: int = 0
    """Learner steps of the run before this one."""

    @property
    def turns(self) -> Turns:
        """The turns of the episodes; an answer is an episode of one turn."""
        return self.tokens.turns or one_turn_each(self.tokens)


@dataclass(frozen=True)
class TokenAdvantages:
    """What a rule makes of a step."""

    advantages_N: Tensor  # float64; what it holds for tokens outside the loss is not looked at
    metrics: Mapping[str, float] = field(default_factory=dict)
    returns_N: Tensor | None = None
    """What the critic learns, float64; None where there is no critic."""
    counted_N: Tensor | None = None
    """Which tokens stay in the loss and its denominators, bool; None leaves out none."""


def without_sure(advantages_N: Tensor, tokens: StepTokens, zero_above: float) -> Tensor:
    """Advantages with 0 for tokens that were sampled with a probability above `zero_above`.

    SPO, arXiv 2505.23564 [P]: there 0.9. As they are for 1.
    """
    if zero_above >= 1:
        return advantages_N
    return advantages_N.masked_fill(tokens.behaviour_logprobs_N > math.log(zero_above), 0.0)


def one_turn_each(tokens: StepTokens) -> Turns:
    """The turns of completions that are one turn each: what was sampled."""
    count = len(tokens.axis.lengths_B)
    given_N = tokens.behaviour_logprobs_N.isnan()
    return Turns(
        completion_U=torch.arange(count),
        number_U=torch.zeros(count, dtype=torch.long),
        turn_N=torch.zeros_like(tokens.token_ids_N).masked_fill(given_N, -1),
        rewards_U=torch.zeros(count, dtype=torch.float64),
        states_U=torch.full((count,), -1),
    )
