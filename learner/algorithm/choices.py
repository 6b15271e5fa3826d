"""Rules that choose among all tokens of an update, which a micro-batch alone cannot do.

A quantile, or a mean over the batch, must not depend on how a step was cut into micro-batches and
ranks. So a rule that needs one is given a pass of its own before the update, without a gradient,
whose log-probabilities and entropies are collected from all ranks. It answers with true or false
for every token, whether it is chosen, or with a number for every token. The rule of the axis then
sees its share of the answer as `chosen_N`.

    top_entropy     the share of highest entropy (credit)
    covariance      the share of highest covariance of log-probability and advantage, or some of
                    those within a band (objectives `kl_cov` and `clip_cov`)
    second_moment   the tokens furthest off the sampler (correction `m2po`)
    divergence      the pull back to the anchor that a constraint on all tokens asks for (`disco`)

Completions without an advantage are not among the tokens, unless the rule says `of_all`.

`token_shares` divides tokens among updates by a token's own probability, which needs no such pass.

Legend: M trained tokens of an update, over all ranks, in the order of the batch. Evidence tags:
[P] paper or official code, [3P] third parties, [D] derived, [I] inferred.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from common.config.algorithm import ObjectiveConfig


@dataclass(frozen=True)
class TokenColumns:
    """What is known of every trained token before an update; all [M], float64."""

    logprobs_M: Tensor
    old_logprobs_M: Tensor  # before the first update of the batch
    behaviour_logprobs_M: Tensor  # NaN where the token was not sampled
    entropy_M: Tensor
    advantages_M: Tensor
    weights_M: Tensor  # of the token's completion, from the aggregation


Chooser = Callable[..., Tensor]
"""Called as function(columns, config, **args) with the arguments that it declares; [M] bool or
float64."""

RuleFunction = TypeVar("RuleFunction", bound=Callable[..., Any])


def chooses(chooser: Chooser, *, of_all: bool = False) -> Callable[[RuleFunction], RuleFunction]:
    """Mark a rule of an axis as one that is given what `chooser` says of every token.

    Args:
        of_all: completions without an advantage count, too, which a step leaves out elsewhere.
    """

    def marked(rule: RuleFunction) -> RuleFunction:
        rule.chooser, rule.of_all = chooser, of_all  # type: ignore[attr-defined]
        return rule

    return marked


TokenShare = Callable[[Tensor], Tensor]
"""From log pi_old of any tokens, [N], whether an update is for them, [N] bool."""


def token_shares(config: ObjectiveConfig) -> list[TokenShare | None]:
    """Which tokens the updates of a batch are for, in their order; None: all of them.

    With `isolate_below`: those less likely than that before the first update, and then the others,
    whose gradients the former would drown. Lopti, arXiv 2505.12929 [P].
    """
    bound = config.isolate_below
    if bound is None:
        return [None]
    return [lambda old_N: old_N.exp() < bound, lambda old_N: old_N.exp() >= bound]


def top_entropy(columns: TokenColumns, config: object, *, share: float) -> Tensor:
    """The ceil(share * M) tokens of highest entropy; ties with the last of them too."""
    return _highest(columns.entropy_M, _ceiling(share * len(columns.entropy_M)))


def covariance(columns: TokenColumns) -> Tensor:
    """(A - mean A)(log pi - mean log pi) of every token, means over all of the update."""
    off_M = columns.advantages_M - columns.advantages_M.mean()
    return off_M * (columns.logprobs_M - columns.logprobs_M.mean())


def highest_covariance(columns: TokenColumns, config: object, *, share: float) -> Tensor:
    """The floor(share * M) tokens of highest covariance, at least one; ties with the last too."""
    cov_M = covariance(columns)
    return _highest(cov_M, max(1, int(share * len(cov_M)))) if len(cov_M) else cov_M.bool()


def some_in_band(
    columns: TokenColumns, config: ObjectiveConfig, *, share: float, lowest: float, highest: float
) -> Tensor:
    """Tokens drawn from those whose covariance lies in the band and that PPO's clip leaves alone.

    floor(share * M) are drawn, at least one. The draw is the same on every rank and in a replay.
    """
    cov_M = covariance(columns)
    ratio_M = (columns.logprobs_M - columns.old_logprobs_M).exp()
    high_M = (columns.advantages_M > 0) & (ratio_M > 1 + config.clip_high)
    low_M = (columns.advantages_M < 0) & (ratio_M < 1 - config.clip_low)
    band_M = (cov_M > lowest) & (cov_M < highest) & ~high_M & ~low_M
    candidates = band_M.nonzero()[:, 0]
    wanted = max(1, int(share * len(cov_M)))
    order = torch.randperm(len(candidates), generator=torch.Generator().manual_seed(0))
    chosen_M = torch.zeros_like(band_M)
    chosen_M[candidates[order[:wanted]]] = True
    return chosen_M


def second_moment(columns: TokenColumns, config: object, *, limit: float) -> Tensor:
    """The fewest tokens furthest off the sampler without which the mean of gap^2 is below `limit`.

    gap is log pi_old - log mu; tokens that were not sampled are not among them. One token is left
    in any case.
    """
    gap_M = columns.old_logprobs_M - columns.behaviour_logprobs_M
    moment_M = (gap_M**2).nan_to_num(nan=0.0)
    sampled_M = ~gap_M.isnan()
    values, order = moment_M[sampled_M].sort(descending=True)
    if not len(values):
        return sampled_M
    left = torch.arange(len(values), 0, -1)
    without_more = (values.flip(0).cumsum(0).flip(0) / left < limit).nonzero()[:, 0]
    dropped = int(without_more[0]) if len(without_more) else len(values) - 1
    chosen_M = torch.zeros_like(sampled_M)
    chosen_M[sampled_M.nonzero()[:, 0][order[:dropped]]] = True
    return chosen_M


def divergence(
    columns: TokenColumns, config: ObjectiveConfig, *, beta: float, delta: float
) -> Tensor:
    """How strongly every token is pulled back: beta max(K - delta, 0) / (M w).

    K is the mean over all M tokens of log anchor - log pi. Weighed by w of its completion, as the
    aggregation does, the sum over tokens of the pull times log pi - log anchor is then that of the
    penalty beta sg[max(K - delta, 0)] K, whatever the aggregation [D].
    """
    anchor_M, sampler_M = columns.old_logprobs_M, columns.behaviour_logprobs_M
    if config.anchor == "behaviour":
        anchor_M = torch.where(sampler_M.isnan(), anchor_M, sampler_M)
    if not len(anchor_M):
        return anchor_M
    excess = beta * ((anchor_M - columns.logprobs_M).mean() - delta).clamp(min=0)
    return torch.where(columns.weights_M > 0, excess / (len(anchor_M) * columns.weights_M), 0.0)


def _ceiling(number: float) -> int:
    """Rounded first: 0.2 * 15 is a hair above 3 in floating point."""
    return -int(-round(number, 9) // 1)


def _highest(values_M: Tensor, count: int) -> Tensor:
    if count < 1 or not len(values_M):
        return torch.zeros_like(values_M, dtype=torch.bool)
    return values_M >= values_M.topk(count).values[-1]
