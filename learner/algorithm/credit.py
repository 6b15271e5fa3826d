"""The credit axis: how the advantage of a completion reaches its tokens.

A credit is a transform of the log-ratios, before the clip, and a weight on every token's surrogate.
`algorithm.credit.kind` names one of those here, or `package.module:function`: a function of
(`CreditInputs`, `CreditConfig`) that returns a `Credit`. See deploy/examples/credit.py.

    broadcast     x, 1: every token the same (GRPO)
    lambda_trace  K x, 1 (`trace`) or x, K^T 1 (`weight`): GRPO-lambda, arXiv 2510.00194
    prefix_sets   x, 1 / |lambda_i(t)|: Sullivan & Koller, arXiv 2509.21154

Legend: N trained tokens. Evidence tags: [P] paper, [R] reviewer, [3P] third parties, [D] derived,
[I] inferred.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from common.config.algorithm import CreditConfig
from learner.algorithm.axis import Axis, tensor_problem, token_cases, token_metric_problem
from learner.algorithm.traces import LambdaTrace, PackedAxis, above_entropy_quantile


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


@dataclass(frozen=True)
class Credit:
    """What a credit rule makes of the tokens of a micro-batch."""

    log_ratio_N: Tensor  # z, what the objective sees
    weight_N: Tensor  # on the token's surrogate
    kl_weight_N: Tensor  # on the token's KL term
    gradient_weight_N: Tensor  # c: gradient at the old policy is A sum_k c_k grad log pi(o_k)
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    """A value a token under each name, [N]; the mean over the step's trained tokens is recorded."""


def _broadcast(inputs: CreditInputs, config: CreditConfig) -> Credit:
    ones_N = torch.ones_like(inputs.log_ratio_N)
    return Credit(inputs.log_ratio_N, ones_N, ones_N, ones_N)


def _prefix_sets(inputs: CreditInputs, config: CreditConfig) -> Credit:
    """Surrogate and KL of a token divided by the size of its process set [P]."""
    if inputs.prefix_counts_N is None:
        raise ValueError("credit `prefix_sets` needs prefix_counts_N")
    share_N = 1 / inputs.prefix_counts_N.to(inputs.log_ratio_N.dtype)
    return Credit(inputs.log_ratio_N, share_N, share_N, share_N)


def _lambda_trace(inputs: CreditInputs, config: CreditConfig) -> Credit:
    """GRPO-lambda's epsilon-trace or epsilon-weight.

    `trace` [3P]: rho = exp(K x) is clipped. `weight` [I] (the paper's formula was not found): the
    ordinary token ratio is clipped and the advantage multiplied by c = K^T 1. Both have the
    gradient A sum_k c_k grad log pi(o_k) at the old policy [D]; `weight` has a token-level trust
    region, while under `trace` a clip of 1 +- 0.2 bounds the summed log-ratio of a window of about
    1 / (1 - d) tokens. `normalize: mean` divides the surrogate of a completion by its mean c in
    either case: the scale of the gradient changes, the clip does not.

    An off-policy correction multiplies the surrogate of row t under `trace`, which is a sum over
    k <= t, and that of token k under `weight`: off-policy the two gradients differ [D].
    """
    trace = build_trace(inputs, config)
    weights_N = trace.weights(inputs.log_ratio_N.detach())
    scale_N = torch.ones_like(weights_N)
    if config.normalize == "mean":
        mean_N = inputs.axis.spread(inputs.axis.mean(weights_N)).to(weights_N.dtype)
        # A mean of 0 means that no token of the completion has credit: nothing to scale.
        scale_N = torch.where(mean_N > 0, 1 / mean_N, 1.0)
    ones_N = torch.ones_like(weights_N)
    return _APPLICATIONS[config.application](
        trace, inputs.log_ratio_N, weights_N * scale_N, scale_N, ones_N
    )


def build_trace(inputs: CreditInputs, config: CreditConfig) -> LambdaTrace:
    """The trace that `config` describes, with its cuts and its selection."""
    keep_N = inputs.behaviour_gap_N.clamp(max=0.0).exp() if config.cut else None
    select_N = None
    if config.entropy_quantile > 0:
        if inputs.entropy_N is None:
            raise ValueError("credit.entropy_quantile > 0 needs entropy_N")
        select_N = above_entropy_quantile(inputs.entropy_N, inputs.axis, config.entropy_quantile)
    return LambdaTrace(inputs.axis, config.trace, config.gamma * config.lambda_, keep_N, select_N)


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
    return CreditInputs(x_N, 0 * ones_N, axis, ones_N, ones_N)


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
    },
    cases=token_cases(_made_up),
    problem=_problem,
    whole_batch=False,
)
