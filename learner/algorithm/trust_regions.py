"""Objectives that keep the policy near its anchor otherwise than by PPO's clip.

    sapo    a smooth gate of the ratio in the place of the clip
    dppo    a token counts while its probability has moved little, not its ratio
    vespo   a smooth weight from the ratio of the whole completion
    dro     a square of the log-ratio holds the policy back
    disco   a penalty where the divergence of all tokens of the update exceeds a bound

The anchor is the policy before the first update of the batch, or the one that sampled
(`objective.anchor`). At a ratio of 1 the gradient of each is that of A log pi.

Legend: N trained tokens, B completions. Evidence tags: [P] paper or official code, [3P] third
parties, [D] derived.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from common.config.algorithm import ObjectiveConfig
from common.config.bounds import Limit, NotNegative, Positive
from learner.algorithm.choices import chooses, divergence
from learner.algorithm.surrogates import (
    LOG_RATIO_LIMIT,
    Surrogate,
    Terms,
    bounded_exp,
    log_policy,
)

_TINY = 1e-8


def sapo(
    terms: Terms,
    config: ObjectiveConfig,
    *,
    tau_positive: Positive = 1.0,
    tau_negative: Positive = 1.05,
) -> Surrogate:
    """Surrogate f(r) A with the gate f(r) = 4 sigmoid(tau (r - 1)) / tau, arXiv 2511.20347 [P].

    Its slope at r = 1 is 1 for every tau; far from it the gradient vanishes. The clips of the
    section are not used.
    """
    advantages_N = terms.advantages_N
    ratio_N = bounded_exp(terms.log_ratio_N)
    tau_N = _by_sign(advantages_N > 0, tau_positive, tau_negative, ratio_N)
    gate_N = 4.0 / tau_N * torch.sigmoid(tau_N * (ratio_N - 1))
    return Surrogate(gate_N * advantages_N, torch.zeros_like(advantages_N, dtype=torch.bool))


def _by_sign(positive: Tensor, one: float, other: float, like: Tensor) -> Tensor:
    """`one` where `positive`, else `other`, in the precision of `like`."""
    return torch.full_like(like, other).masked_fill(positive, one)


def dppo(
    terms: Terms,
    config: ObjectiveConfig,
    *,
    divergence: Literal["tv", "kl"] = "tv",
    ratio_cap: Limit = 20.0,
) -> Surrogate:
    """Surrogate A sg[min(r, cap)] log pi of the tokens that moved little, arXiv 2602.04879 [P].

    `clip_low` and `clip_high` bound how far a token's probability may have moved from its
    anchor's, against the direction of A alone: by the difference (`tv`, 0.15 in verl's script) or
    by the divergence of the two coins "this token or another" (`kl`, 0.05 there). Tokens beyond
    the bound keep no gradient.
    """
    advantages_N = terms.advantages_N
    ratio_N = bounded_exp(terms.log_ratio_N.detach()).clamp(max=ratio_cap)
    anchor_N, policy_N = terms.anchor_N.exp(), terms.logprobs_N.exp()
    moved_N = _DIVERGENCES[divergence](anchor_N, policy_N)
    up_N, down_N = policy_N > anchor_N, policy_N < anchor_N
    too_far_N = torch.where(
        advantages_N > 0,
        up_N & (moved_N > config.clip_high),
        down_N & (moved_N > config.clip_low),
    )
    values_N = advantages_N * ratio_N * log_policy(terms)
    return Surrogate(values_N.masked_fill(too_far_N, 0.0), too_far_N & (advantages_N != 0))


def _total_variation(anchor_N: Tensor, policy_N: Tensor) -> Tensor:
    return (policy_N - anchor_N).abs()


def _coin_divergence(anchor_N: Tensor, policy_N: Tensor) -> Tensor:
    """KL(anchor || policy) of "this token or another", in nats."""
    this_N = anchor_N * (anchor_N.clamp(min=_TINY) / policy_N.clamp(min=_TINY)).log()
    other_N = (1 - anchor_N) * ((1 - anchor_N + _TINY) / (1 - policy_N + _TINY)).log()
    return this_N + other_N


_DIVERGENCES = {"tv": _total_variation, "kl": _coin_divergence}


def vespo(
    terms: Terms,
    config: ObjectiveConfig,
    *,
    power_positive: Positive = 2.0,
    decay_positive: Positive = 3.0,
    power_negative: Positive = 3.0,
    decay_negative: Positive = 2.0,
) -> Surrogate:
    """Surrogate phi(W) A log pi, W the ratio of the whole completion, arXiv 2602.10693 [P].

    phi(W) = W^k e^(lambda (1 - W)) carries no gradient; phi(1) = 1, and it falls off on both
    sides of W = k / lambda. (k, lambda) is (2, 3) for advantages of at least 0, else (3, 2).
    """
    log_W = terms.axis.sum(terms.log_ratio_N.detach()).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    log_W = terms.axis.spread(log_W)
    positive_N = terms.advantages_N >= 0
    power_N = _by_sign(positive_N, power_positive, power_negative, log_W)
    decay_N = _by_sign(positive_N, decay_positive, decay_negative, log_W)
    phi_N = (power_N * log_W + decay_N * (1 - log_W.exp())).exp()
    scale_N = phi_N.to(terms.logprobs_N.dtype) * terms.advantages_N
    values_N = scale_N * log_policy(terms)
    return Surrogate(values_N, torch.zeros_like(values_N, dtype=torch.bool))


def dro(terms: Terms, config: ObjectiveConfig, *, tau: Positive = 0.1) -> Surrogate:
    """Surrogate A log pi - tau / 2 log(r)^2, as in Kimi k1.5 and DRO (arXiv 2501.12599 [3P])."""
    values_N = terms.advantages_N * log_policy(terms) - tau / 2 * terms.log_ratio_N**2
    return Surrogate(values_N, torch.zeros_like(values_N, dtype=torch.bool))


@chooses(divergence, of_all=True)
def disco(
    terms: Terms,
    config: ObjectiveConfig,
    *,
    beta: NotNegative = 1000.0,
    delta: NotNegative = 1e-4,
) -> Surrogate:
    """Surrogate A log pi, less beta sg[max(K - delta, 0)] K: DisCO, arXiv 2505.12366 [P].

    K is the mean of log anchor - log pi over all tokens of the update, those of completions without
    an advantage among them. The authors' code takes it over a micro-batch of all ranks [P]. The
    clips of the section are not used; a token counts as clipped where the penalty acts.
    """
    if terms.chosen_N is None:
        raise ValueError("objective `disco` needs chosen_N")
    pull_N = terms.chosen_N.to(terms.log_ratio_N.dtype)
    values_N = terms.advantages_N * log_policy(terms) + pull_N * terms.log_ratio_N
    return Surrogate(values_N, pull_N > 0)
