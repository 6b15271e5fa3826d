"""The credit axis: how the advantage of a completion reaches its tokens.

A credit is a transform of the log-ratios, before the clip, and a weight on every token's surrogate.
`algorithm.credit.kind` names one of those here, or `package.module:function`: a function of
(`CreditInputs`, `CreditConfig`) that returns a `Credit`. See deploy/examples/credit.py.

    broadcast     x, 1: every token the same (GRPO)
    lambda_trace  K x, 1 (`trace`) or x, K^T 1 (`weight`): GRPO-lambda, arXiv 2510.00194
    prefix_sets   x, 1 / |lambda_i(t)|: Sullivan & Koller, arXiv 2509.21154
    top_entropy   x, 1 or 0: the 80/20 rule, arXiv 2506.01939
    probability   x, a weight that grows with the token's probability: AR, arXiv 2505.12929;
                  `probability_sigmoid`: TR-GRPO, arXiv 2511.00066

Legend: N trained tokens. Evidence tags: [P] paper, [R] reviewer, [3P] third parties, [D] derived,
[I] inferred.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from common.config.algorithm import CreditConfig
from common.config.bounds import Limit, NotNegative, Positive, PositiveShare, Share
from learner.algorithm.axis import Axis, tensor_problem, token_cases, token_metric_problem
from learner.algorithm.choices import chooses, top_entropy
from learner.algorithm.traces import (
    LambdaTrace,
    PackedAxis,
    above_entropy_quantile,
    suffix_ratio,
)


@dataclass(frozen=True)
class CreditInputs:
    """What a credit rule sees of a micro-batch.

    The optional columns are there where the configuration needs them, and for a rule of a user's
    own.
    """

    log_ratio_N: Tensor  # x = log pi - log pi_old, carries the gradient
    behaviour_gap_N: Tensor  # log pi_old - log mu, 0 where the token was not sampled
    axis: PackedAxis
    entropy_N: Tensor | None
    prefix_counts_N: Tensor | None
    logprobs_N: Tensor  # log pi, detached
    old_logprobs_N: Tensor  # log pi before the first update of the batch
    chosen_N: Tensor | None = None
    """Tokens that the rule has chosen among all of the update (`learner.algorithm.choices`)."""
    advantages_N: Tensor | None = None
    """Advantages of tokens, where those of a completion may differ."""


@dataclass(frozen=True)
class Credit:
    """What a credit rule makes of the tokens of a micro-batch."""

    log_ratio_N: Tensor  # z, what the objective sees
    weight_N: Tensor  # on the token's surrogate
    kl_weight_N: Tensor  # on the token's KL term
    gradient_weight_N: Tensor  # c: gradient at the old policy is A sum_k c_k grad log pi(o_k)
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    """A value a token under each name, [N]; the mean over the step's trained tokens is recorded."""
    advantages_N: Tensor | None = None
    """Advantages in the place of those that the rule was given, where tokens differ in them."""
    gradient_advantages_N: Tensor | None = None
    """The gradient at the old policy is the sum of this times grad log pi(o_k), where tokens differ
    in advantage; None: advantage times c."""


def _broadcast(inputs: CreditInputs, config: CreditConfig) -> Credit:
    ones_N = torch.ones_like(inputs.log_ratio_N)
    return Credit(inputs.log_ratio_N, ones_N, ones_N, ones_N)


def _prefix_sets(inputs: CreditInputs, config: CreditConfig) -> Credit:
    """Surrogate and KL of a token divided by the size of its process set [P]."""
    if inputs.prefix_counts_N is None:
        raise ValueError("credit `prefix_sets` needs prefix_counts_N")
    share_N = 1 / inputs.prefix_counts_N.to(inputs.log_ratio_N.dtype)
    return Credit(inputs.log_ratio_N, share_N, share_N, share_N)


@chooses(top_entropy)
def _top_entropy(
    inputs: CreditInputs, config: CreditConfig, *, share: PositiveShare = 0.2
) -> Credit:
    """1 for the `share` of an update's tokens of highest entropy, else 0: arXiv 2506.01939 [P].

    The others keep their KL term and their place in every denominator, as in the paper and TRL;
    the official code leaves them out of the denominator, which is 1 / share times as much [P].
    """
    if inputs.chosen_N is None:
        raise ValueError("credit `top_entropy` needs chosen_N")
    return _weighted(inputs, inputs.chosen_N.to(inputs.log_ratio_N.dtype))


def _probability(inputs: CreditInputs, config: CreditConfig, *, alpha: Share = 0.2) -> Credit:
    """alpha pi_old + 1 - alpha: advantage reweighting (AR), arXiv 2505.12929 [P].

    Rare tokens have the largest gradients and drown the others; this takes some of it off them.
    """
    return _weighted(inputs, alpha * inputs.old_logprobs_N.clamp(max=0.0).exp() + 1 - alpha)


def _probability_sigmoid(
    inputs: CreditInputs,
    config: CreditConfig,
    *,
    scale: Positive = 2.0,
    slope: Positive = 9.0,
    centre: Share = 0.25,
    low: NotNegative = 1.0,
    high: Positive = 1.4,
) -> Credit:
    """clip(scale sigmoid(slope (pi - centre)), low, high): TR-GRPO, arXiv 2511.00066, read so [I].

    There is no official code. That the weight is clipped and grows with pi is [P, abstract]. The
    one transcription has sigmoid(pi / 9) - 0.25, which is 1 for every pi [3P]; with the same
    constants this form goes from 1 to 1.4 and is flat from pi = 0.344 on [D].
    """
    away_N = inputs.logprobs_N.exp() - centre
    return _weighted(inputs, (scale * torch.sigmoid(slope * away_N)).clamp(low, high))


def _weighted(inputs: CreditInputs, weight_N: Tensor) -> Credit:
    """Weights on the surrogate alone."""
    return Credit(inputs.log_ratio_N, weight_N, torch.ones_like(weight_N), weight_N)


def _lambda_trace(
    inputs: CreditInputs,
    config: CreditConfig,
    *,
    weighted_mean: bool = False,
    cut_bound: Limit = 1.0,
    cut_by_factor: bool = False,
) -> Credit:
    """GRPO-lambda's epsilon-trace or epsilon-weight.

    `trace` [3P]: rho = exp(K x) is clipped. `weight` [I] (the paper's formula was not found): the
    ordinary token ratio is clipped and the advantage multiplied by c = K^T 1. Both have the
    gradient A sum_k c_k grad log pi(o_k) at the old policy [D]; `weight` has a token-level trust
    region, while under `trace` a clip of 1 +- 0.2 bounds the summed log-ratio of a window of about
    1 / (1 - d) tokens.

    `normalize: mean` divides the surrogate of a completion by its mean c in either case: the scale
    of the gradient changes, the clip does not.

    `weighted_mean` divides every row of K by its sum, so that z_t is a weighted mean of log-ratios
    and not their sum; the mean c is then 1 whatever the length, but for `terminal`. With d = 1,
    `terminal` and `normalize: mean` that is GSPO [D]: the uniform case, which the abstract of
    S-trace (arXiv 2605.05965) has for eligibility traces [P]. Its formulas were not found.

    `cut` takes credit off the tokens in front of those that the policy would no longer choose
    (`learner.algorithm.traces.suffix_ratio`); `cut_bound` and `cut_by_factor` bound its product.

    An off-policy correction multiplies the surrogate of row t under `trace`, which is a sum over
    k <= t, and that of token k under `weight`: off-policy the two gradients differ [D]. A cut
    counts on the latter, so `Recipe` refuses it under `trace` with a correction.
    """
    trace = replace(build_trace(inputs, config, cut_bound, cut_by_factor), mean=weighted_mean)
    weights_N = trace.weights(inputs.log_ratio_N.detach())
    scale_N = torch.ones_like(weights_N)
    if config.normalize == "mean":
        # Of the trace before its cut: else the scale would give back what the cut takes.
        whole_N = replace(trace, scale_N=None).weights(weights_N)
        mean_N = inputs.axis.spread(inputs.axis.mean(whole_N)).to(weights_N.dtype)
        # A mean of 0 means that no token of the completion has credit: nothing to scale.
        scale_N = torch.where(mean_N > 0, 1 / mean_N, 1.0)
    ones_N = torch.ones_like(weights_N)
    credit = _APPLICATIONS[config.application](
        trace, inputs.log_ratio_N, weights_N * scale_N, scale_N, ones_N
    )
    if inputs.advantages_N is None:
        return credit
    # Row t of the trace carries the advantage of token t: token k gets K^T of them.
    reached_N = trace.transposed(trace.rows(ones_N) * inputs.advantages_N)
    if config.application == "weight":
        credit = replace(credit, weight_N=scale_N, advantages_N=reached_N)
    return replace(credit, gradient_advantages_N=reached_N * scale_N)


def build_trace(
    inputs: CreditInputs, config: CreditConfig, bound: float, by_factor: bool
) -> LambdaTrace:
    """The trace that `config` describes, with its cut and its selection."""
    scale_N = select_N = None
    if config.cut:
        gap_N = inputs.behaviour_gap_N
        scale_N = suffix_ratio(gap_N, inputs.axis, bound, by_factor=by_factor)
    if config.entropy_quantile > 0:
        if inputs.entropy_N is None:
            raise ValueError("credit.entropy_quantile > 0 needs entropy_N")
        select_N = above_entropy_quantile(inputs.entropy_N, inputs.axis, config.entropy_quantile)
    decay = config.gamma * config.lambda_
    return LambdaTrace(
        inputs.axis, config.trace, decay, scale_N, select_N, turn_decay=config.turn_decay
    )


def _inside_ratio(
    trace: LambdaTrace, log_ratio_N: Tensor, weights_N: Tensor, scale_N: Tensor, ones_N: Tensor
) -> Credit:
    rows_N = trace.rows(ones_N)
    return Credit(trace.apply(log_ratio_N), rows_N * scale_N, ones_N, weights_N)


def _on_advantage(
    trace: LambdaTrace, log_ratio_N: Tensor, weights_N: Tensor, scale_N: Tensor, ones_N: Tensor
) -> Credit:
    return Credit(log_ratio_N, weights_N, ones_N, weights_N)


_APPLICATIONS: dict[str, Callable[[LambdaTrace, Tensor, Tensor, Tensor, Tensor], Credit]] = {
    "trace": _inside_ratio,
    "weight": _on_advantage,
}


def _made_up(lengths: list[int]) -> CreditInputs:
    axis = PackedAxis(torch.tensor(lengths))
    ones_N = torch.ones(sum(lengths))
    x_N = torch.linspace(-0.2, 0.3, sum(lengths)).requires_grad_()
    logprobs_N = x_N.detach() - 1
    return CreditInputs(x_N, 0 * ones_N, axis, ones_N, ones_N, logprobs_N, logprobs_N)


def _problem(inputs: CreditInputs, credit: Credit) -> str | None:
    for name in ("log_ratio_N", "weight_N", "kl_weight_N", "gradient_weight_N"):
        if wrong := tensor_problem(name, getattr(credit, name), inputs.log_ratio_N):
            return wrong
    if not credit.log_ratio_N.requires_grad:
        return "returned a log_ratio_N without the gradient of inputs.log_ratio_N: keep it"
    return token_metric_problem(credit.metrics, inputs.log_ratio_N)


CREDITS: Axis[CreditInputs, CreditConfig, Credit] = Axis(
    name="credit",
    inputs=CreditInputs,
    result=Credit,
    rules={
        "broadcast": _broadcast,
        "lambda_trace": _lambda_trace,
        "prefix_sets": _prefix_sets,
        "top_entropy": _top_entropy,
        "probability": _probability,
        "probability_sigmoid": _probability_sigmoid,
    },
    cases=token_cases(_made_up),
    problem=_problem,
    whole_batch=False,
)
