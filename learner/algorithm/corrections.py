"""Off-policy corrections: a constant weight a token from pi_old / mu, mu the behaviour policy.

The policy that sampled a token (another weight version, another engine) is not the pi_old of the
update. The weight multiplies the token's surrogate and carries no gradient.

    tis     min(ratio, cap): truncated importance sampling [3P]
    icepop  ratio inside [floor, cap], 0 outside: IcePop, masked importance sampling [3P]

At `sequence` level the ratio is the product over the completion's tokens. Tokens that the policy
did not sample (behaviour log-probability NaN) have no ratio: weight 1, and no part in products.

Legend: N trained tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from common.config.algorithm import CorrectionConfig
from learner.algorithm.objectives import bounded_exp
from learner.algorithm.traces import PackedAxis


def behaviour_gap(old_logprobs_N: Tensor, behaviour_logprobs_N: Tensor) -> Tensor:
    """log pi_old - log mu, [N], detached; 0 where the token was not sampled."""
    gap_N = (old_logprobs_N - behaviour_logprobs_N).detach()
    return gap_N.masked_fill(behaviour_logprobs_N.isnan(), 0.0)


def _none(ratio_N: Tensor, config: CorrectionConfig) -> Tensor:
    return torch.ones_like(ratio_N)


def _tis(ratio_N: Tensor, config: CorrectionConfig) -> Tensor:
    return ratio_N.clamp(max=config.cap)


def _icepop(ratio_N: Tensor, config: CorrectionConfig) -> Tensor:
    inside_N = (ratio_N >= config.floor) & (ratio_N <= config.cap)
    return ratio_N * inside_N


CORRECTIONS: dict[str, Callable[[Tensor, CorrectionConfig], Tensor]] = {
    "none": _none,
    "tis": _tis,
    "icepop": _icepop,
}


def _token_level(gap_N: Tensor, axis: PackedAxis) -> Tensor:
    return gap_N


def _sequence_level(gap_N: Tensor, axis: PackedAxis) -> Tensor:
    return axis.spread(axis.sum(gap_N).to(gap_N.dtype))


LEVELS: dict[str, Callable[[Tensor, PackedAxis], Tensor]] = {
    "token": _token_level,
    "sequence": _sequence_level,
}


def correction_weights(
    gap_N: Tensor, sampled_N: Tensor, axis: PackedAxis, kind: str, config: CorrectionConfig
) -> Tensor:
    """Weights [N] from `behaviour_gap`; 1 where `sampled_N` is False."""
    ratio_N = bounded_exp(LEVELS[config.level](gap_N, axis))
    weights_N = CORRECTIONS[kind](ratio_N, config)
    return weights_N.masked_fill(~sampled_N, 1.0)
