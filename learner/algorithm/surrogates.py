"""What every objective is made from, and what it returns.

Ratios are exp(z) up to z = `LOG_RATIO_LIMIT` and its tangent from there on: e^20 = 5e8 keeps every
product and sum of float32 finite, and the gradient bounded without ever vanishing.

Legend: N trained tokens, B completions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor

from learner.algorithm.traces import PackedAxis

LOG_RATIO_LIMIT = 20.0


@dataclass(frozen=True)
class Terms:
    """What an objective is made from: a micro-batch."""

    log_ratio_N: Tensor  # z, carries the gradient
    logprobs_N: Tensor  # log pi, detached
    advantages_B: Tensor
    axis: PackedAxis
    behaviour_gap_N: Tensor  # log pi_old - log mu, 0 where the token was not sampled
    anchor_logprobs_N: Tensor | None = None
    """Log-probability under the policy that ratios are to, detached; None: `logprobs_N` less z."""
    token_advantages_N: Tensor | None = None
    """Advantages of tokens, where those of a completion may differ."""
    chosen_N: Tensor | None = None
    """What the rule was told of every token, among all of the update: whether it is chosen, or a
    number (`learner.algorithm.choices`)."""

    elsewhere_gap_N: Tensor | None = None
    """Difference log pi_old - log mu where a token was sampled behind another prompt, else 0; None:
    no token was."""
    elsewhere_B: Tensor | None = None
    """The completions of such tokens, bool."""

    @cached_property
    def advantages_N(self) -> Tensor:
        """The advantage of every token: its own, or that of its completion."""
        if self.token_advantages_N is not None:
            return self.token_advantages_N
        return self.axis.spread(self.advantages_B)

    @property
    def anchor_N(self) -> Tensor:
        """Log-probability of every token under the policy that ratios are to."""
        if self.anchor_logprobs_N is not None:
            return self.anchor_logprobs_N
        return self.logprobs_N - self.log_ratio_N.detach()


@dataclass(frozen=True)
class Surrogate:
    """What an objective makes of the tokens of a micro-batch."""

    values_N: Tensor  # to be maximised, carries the gradient
    clipped_N: Tensor  # bool: the clip is active
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    """A value a token under each name, [N]; the mean over the step's trained tokens is recorded."""


def bounded_exp(log_ratio: Tensor) -> Tensor:
    """The exponential up to LOG_RATIO_LIMIT, and its tangent beyond."""
    beyond = (log_ratio - LOG_RATIO_LIMIT).clamp(min=0.0)
    return log_ratio.clamp(max=LOG_RATIO_LIMIT).exp() + math.exp(LOG_RATIO_LIMIT) * beyond


def log_policy(terms: Terms) -> Tensor:
    """The value of log pi with the gradient of z."""
    return terms.logprobs_N + terms.log_ratio_N - terms.log_ratio_N.detach()
