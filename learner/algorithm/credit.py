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

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from common.config.algorithm import CreditConfig
from common.errors import UserError
from learner.algorithm.traces import LambdaTrace, PackedAxis, above_entropy_quantile


@dataclass(frozen=True)
class CreditInputs:
    """Per trained token; the optional ones where the configuration needs them, and for a rule of
    one's own."""

    log_ratio_N: Tensor  # x = log pi - log pi_old, carries the gradient
    behaviour_gap_N: Tensor  # log pi_old - log mu, 0 where the token was not sampled
    axis: PackedAxis
    entropy_N: Tensor | None
    prefix_counts_N: Tensor | None


@dataclass(frozen=True)
class Credit:
    log_ratio_N: Tensor  # z, what the objective sees
    weight_N: Tensor  # on the token's surrogate
    kl_weight_N: Tensor  # on the token's KL term
    gradient_weight_N: Tensor  # c: gradient at the old policy is A sum_k c_k grad log pi(o_k)


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

CreditRule = Callable[[CreditInputs, CreditConfig], Credit]

CREDITS: dict[str, CreditRule] = {
    "broadcast": _broadcast,
    "lambda_trace": _lambda_trace,
    "prefix_sets": _prefix_sets,
}


@functools.cache
def credit_rule(kind: str) -> CreditRule:
    """The rule called `kind`: one of `CREDITS`, or imported by its path.

    Raises:
        UserError: it cannot be imported from here. The learner's ranks look for it where the run
            was started, and on PYTHONPATH.
    """
    if kind in CREDITS:
        return CREDITS[kind]
    module, _, name = kind.partition(":")
    try:
        rule: CreditRule = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, SyntaxError, ValueError) as error:
        raise UserError(
            f"algorithm.credit.kind={kind} cannot be imported: {error}. Use one of "
            f"{', '.join(CREDITS)}, or package.module:function, importable from the directory the "
            "run was started in or from PYTHONPATH"
        ) from error
    return rule


def check_credit(config: CreditConfig) -> None:
    """Try a rule of one's own on a few tokens, and on none, as the learner will.

    Raises:
        UserError: it cannot be imported, raises, or does not return finite tensors of one value a
            token with a gradient to the policy.
    """
    if config.kind in CREDITS:
        return
    rule = credit_rule(config.kind)
    for lengths in ([3, 1], [0]):
        size = sum(lengths)
        ones_N, axis = torch.ones(size), PackedAxis(torch.tensor(lengths))
        x_N = torch.linspace(-0.2, 0.3, size).requires_grad_()
        wrong = _what_is_wrong(rule, CreditInputs(x_N, 0 * ones_N, axis, ones_N, ones_N), config)
        if wrong is not None:
            raise UserError(
                f"algorithm.credit.kind={config.kind}, tried on completions of {lengths} tokens, "
                f"{wrong}"
            )


def _what_is_wrong(rule: CreditRule, inputs: CreditInputs, config: CreditConfig) -> str | None:
    """Of the rule's answer; None where nothing is."""
    try:
        credit = rule(inputs, config)
    except Exception as error:  # a rule is a program of the user's; it may raise anything
        return (
            f"raised {type(error).__name__}: {error}. It is called as "
            "function(CreditInputs, CreditConfig)"
        )
    if not isinstance(credit, Credit):
        return f"returned a {type(credit).__name__}: return a learner.algorithm.credit.Credit"
    for name, value_N in vars(credit).items():
        right = isinstance(value_N, Tensor) and value_N.shape == inputs.log_ratio_N.shape
        if not right or not value_N.isfinite().all():
            return f"returned a {name} that is not one finite value a token, of shape [N]"
    if not credit.log_ratio_N.requires_grad:
        return "returned a log_ratio_N without the gradient of inputs.log_ratio_N: keep it"
    return None
