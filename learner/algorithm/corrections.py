"""Off-policy corrections: a constant weight a token from pi_old / mu, mu the behaviour policy.

The policy that sampled a token (another weight version, another engine) is not the pi_old of the
update. The weight multiplies the token's surrogate and carries no gradient.

    tis              min(ratio, cap): truncated importance sampling [3P]
    icepop           ratio inside [low, high], 0 outside: IcePop, masked importance sampling [3P]
    sequence_mask    the ratio, and 0 for completions whose ratio as a whole left [low, high]
    off_policy_mask  0 for completions of negative advantage that the policy has left behind
    topr             min(ratio, 1) where the advantage is not positive, 1 where it is
    m2po             0 for the few tokens that make the ratios' second moment large

At `sequence` level the ratio is the product over the completion's tokens. Tokens that the policy
did not sample (behaviour log-probability NaN) have no ratio: weight 1, and no part in products.

Legend: N trained tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from common.config.algorithm import CorrectionConfig
from common.config.bounds import Limit, NotNegative, Positive
from learner.algorithm.axis import Axis, tensor_problem, token_cases, token_metric_problem
from learner.algorithm.choices import chooses, second_moment
from learner.algorithm.surrogates import bounded_exp
from learner.algorithm.traces import PackedAxis


def behaviour_gap(old_logprobs_N: Tensor, behaviour_logprobs_N: Tensor) -> Tensor:
    """The gap log pi_old - log mu, [N], detached; 0 where the token was not sampled."""
    gap_N = (old_logprobs_N - behaviour_logprobs_N).detach()
    return gap_N.masked_fill(behaviour_logprobs_N.isnan(), 0.0)


@dataclass(frozen=True)
class CorrectionInputs:
    """What a correction sees of a micro-batch; all [N] and without a gradient."""

    ratio_N: Tensor  # pi_old / mu at the level of the configuration
    behaviour_gap_N: Tensor  # log pi_old - log mu of the token, 0 where it was not sampled
    sampled_N: Tensor  # bool; what a rule returns for the others is not looked at
    axis: PackedAxis
    advantages_N: Tensor  # that of the token's completion
    chosen_N: Tensor | None = None
    """Tokens that the rule has chosen among all of the update (`learner.algorithm.choices`)."""


@dataclass(frozen=True)
class Correction:
    """What a correction makes of the tokens of a micro-batch."""

    weight_N: Tensor  # on the token's surrogate
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    """A value a token under each name, [N]; the mean over the step's trained tokens is recorded."""


def _none(inputs: CorrectionInputs, config: CorrectionConfig) -> Correction:
    return Correction(torch.ones_like(inputs.ratio_N))


def _tis(inputs: CorrectionInputs, config: CorrectionConfig) -> Correction:
    return Correction(inputs.ratio_N.clamp(max=config.cap))


def _icepop(
    inputs: CorrectionInputs,
    config: CorrectionConfig,
    *,
    low: NotNegative = 0.5,
    high: Limit = 5.0,
) -> Correction:
    """The ratio where it lies in [low, high], else 0; the band is IcePop's own [3P]."""
    ratio_N = inputs.ratio_N
    return Correction(ratio_N * ((ratio_N >= low) & (ratio_N <= high)))


def _sequence_mask(
    inputs: CorrectionInputs,
    config: CorrectionConfig,
    *,
    measure: Literal["product", "geometric"] = "product",
    low: NotNegative = 0.0,
    high: Limit = 3.0,
    weigh: bool = True,
) -> Correction:
    """The ratio, and 0 for whole completions whose ratio lies outside [low, high].

    `measure` is the ratio that decides: the product over the sampled tokens (TRL's default, with
    a cap of 3 [3P]) or their geometric mean (verl, OpenRLHF [3P]). Without `weigh` a completion
    that stays has weight 1: rejection alone, as in verl.
    """
    total_B = inputs.axis.sum(inputs.behaviour_gap_N)
    if measure == "geometric":
        total_B = total_B / inputs.axis.sum(inputs.sampled_N).clamp(min=1)
    ratio_N = inputs.axis.spread(bounded_exp(total_B))
    kept_N = (ratio_N >= low) & (ratio_N <= high)
    weight_N = inputs.ratio_N if weigh else torch.ones_like(inputs.ratio_N)
    return Correction(weight_N * kept_N)


def _off_policy_mask(
    inputs: CorrectionInputs, config: CorrectionConfig, *, gap: NotNegative = 0.5
) -> Correction:
    """0 where A < 0 and the mean of log mu - log pi_old exceeds `gap`, else 1.

    DeepSeek-V3.2's mask of sequences (arXiv 2512.02556 [3P]; TRL). A policy that has moved away
    from a bad answer learns nothing more from it.
    """
    moved_B = -inputs.axis.sum(inputs.behaviour_gap_N)
    mean_N = inputs.axis.spread(moved_B / inputs.axis.sum(inputs.sampled_N).clamp(min=1))
    left_N = (inputs.advantages_N < 0) & (mean_N > gap)
    return Correction(torch.ones_like(inputs.ratio_N).masked_fill(left_N, 0.0))


def _topr(inputs: CorrectionInputs, config: CorrectionConfig) -> Correction:
    """min(ratio, 1) where A <= 0, else 1: TOPR, arXiv 2503.14286 [3P]."""
    tapered_N = inputs.ratio_N.clamp(max=1.0)
    return Correction(torch.where(inputs.advantages_N > 0, 1.0, tapered_N).to(tapered_N.dtype))


@chooses(second_moment)
def _m2po(
    inputs: CorrectionInputs, config: CorrectionConfig, *, limit: Positive = 0.04
) -> Correction:
    """0 for the tokens furthest off the sampler, until the mean of gap^2 is below `limit`, else 1.

    M2PO, arXiv 2510.01161; the rule and 0.04 as in AReaL [3P]. It keeps far more tokens than a
    clip where data are old, and bounds their variance all the same. Over the whole update.
    """
    if inputs.chosen_N is None:
        raise ValueError("correction `m2po` needs chosen_N")
    return Correction((~inputs.chosen_N).to(inputs.ratio_N.dtype))


def _made_up(lengths: list[int]) -> CorrectionInputs:
    gap_N = torch.linspace(-0.2, 0.3, sum(lengths))
    sampled_N = torch.ones(sum(lengths), dtype=torch.bool)
    axis = PackedAxis(torch.tensor(lengths))
    advantages_N = axis.spread(torch.linspace(1.0, -1.0, len(lengths)))
    return CorrectionInputs(gap_N.exp(), gap_N, sampled_N, axis, advantages_N)


def _problem(inputs: CorrectionInputs, correction: Correction) -> str | None:
    wrong = tensor_problem("weight_N", correction.weight_N, inputs.ratio_N)
    return wrong or token_metric_problem(correction.metrics, inputs.ratio_N)


CORRECTIONS: Axis[CorrectionInputs, CorrectionConfig, Correction] = Axis(
    name="correction",
    inputs=CorrectionInputs,
    result=Correction,
    rules={
        "none": _none,
        "tis": _tis,
        "icepop": _icepop,
        "sequence_mask": _sequence_mask,
        "off_policy_mask": _off_policy_mask,
        "topr": _topr,
        "m2po": _m2po,
    },
    cases=token_cases(_made_up),
    problem=_problem,
    whole_batch=False,
)


def _token_level(gap_N: Tensor, axis: PackedAxis) -> Tensor:
    return gap_N


def _sequence_level(gap_N: Tensor, axis: PackedAxis) -> Tensor:
    return axis.spread(axis.sum(gap_N).to(gap_N.dtype))


LEVELS: dict[str, Callable[[Tensor, PackedAxis], Tensor]] = {
    "token": _token_level,
    "sequence": _sequence_level,
}


def correct(
    gap_N: Tensor,
    sampled_N: Tensor,
    axis: PackedAxis,
    advantages_N: Tensor,
    config: CorrectionConfig,
    chosen_N: Tensor | None = None,
) -> Correction:
    """Weights from `behaviour_gap`; 1 where `sampled_N` is False. `config.kind` is not `auto`."""
    ratio_N = bounded_exp(LEVELS[config.level](gap_N, axis))
    inputs = CorrectionInputs(ratio_N, gap_N, sampled_N, axis, advantages_N, chosen_N)
    found = CORRECTIONS.rule(config)(inputs)
    return replace(found, weight_N=found.weight_N.masked_fill(~sampled_N, 1.0))
