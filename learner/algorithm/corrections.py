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

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from common.config.algorithm import CorrectionConfig
from learner.algorithm.axis import Axis, tensor_problem, token_cases, token_metric_problem
from learner.algorithm.objectives import bounded_exp
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


def _icepop(inputs: CorrectionInputs, config: CorrectionConfig) -> Correction:
    ratio_N = inputs.ratio_N
    return Correction(ratio_N * ((ratio_N >= config.floor) & (ratio_N <= config.cap)))


def _made_up(lengths: list[int]) -> CorrectionInputs:
    gap_N = torch.linspace(-0.2, 0.3, sum(lengths))
    sampled_N = torch.ones(sum(lengths), dtype=torch.bool)
    return CorrectionInputs(gap_N.exp(), gap_N, sampled_N, PackedAxis(torch.tensor(lengths)))


def _problem(inputs: CorrectionInputs, correction: Correction) -> str | None:
    wrong = tensor_problem("weight_N", correction.weight_N, inputs.ratio_N)
    return wrong or token_metric_problem(correction.metrics, inputs.ratio_N)


CORRECTIONS: Axis[CorrectionInputs, CorrectionConfig, Correction] = Axis(
    name="correction",
    inputs=CorrectionInputs,
    result=Correction,
    rules={"none": _none, "tis": _tis, "icepop": _icepop},
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
    gap_N: Tensor, sampled_N: Tensor, axis: PackedAxis, config: CorrectionConfig
) -> Correction:
    """Weights from `behaviour_gap`; 1 where `sampled_N` is False. `config.kind` is not `auto`."""
    ratio_N = bounded_exp(LEVELS[config.level](gap_N, axis))
    found = CORRECTIONS.rule(config)(CorrectionInputs(ratio_N, gap_N, sampled_N, axis))
    return replace(found, weight_N=found.weight_N.masked_fill(~sampled_N, 1.0))
