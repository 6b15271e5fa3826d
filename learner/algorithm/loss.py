"""The loss of a microbatch: credit, objective, correction and KL composed, one pass.

    x = log pi - log anchor  ->  credit  ->  objective  ->  * correction  ->  - beta * k3
    l_{i,t} = weight * correction * surrogate - kl_weight * beta * k3
    L = -sum_i w_i sum_t l_{i,t}

Tokens outside the loss mask are taken out first: they have no place on the axis of a trace, no
part in any mean, and may hold NaN. "Completion" below means its trained tokens.

Legend: B completions of the microbatch, N all their tokens back to back; after `_trained_tokens`
the same letter N means trained tokens only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from common.config.algorithm import AlgorithmConfig, ObjectiveConfig
from learner.algorithm.corrections import behaviour_gap, correct
from learner.algorithm.credit import CREDITS, Credit, CreditInputs
from learner.algorithm.objectives import OBJECTIVES, k3
from learner.algorithm.surrogates import Surrogate, Terms, bounded_exp
from learner.algorithm.traces import PackedAxis

Metrics = dict[str, tuple[float, float]]
"""(weighted sum, weight) under each name: both add over microbatches and ranks, and the value is
sum / weight. Weight 0 says that the value is the sum itself (the parts of the loss)."""


@dataclass
class CompletionBatch:
    """Some completions of the global batch, token axis packed."""

    logprobs_N: Tensor  # log pi of the policy being trained, float32 or float64, requires grad
    old_logprobs_N: Tensor  # log pi before the first optimiser step on this batch, detached
    behaviour_logprobs_N: Tensor  # log mu of the sampler; NaN where the token was not sampled
    reference_logprobs_N: Tensor | None
    entropy_N: Tensor | None  # of the policy being trained, nats, detached
    loss_mask_N: Tensor  # bool
    lengths_B: Tensor  # long, all tokens of the completion, masked ones included
    advantages_B: Tensor
    token_weights_B: Tensor  # w_i, from the aggregation over the whole global batch
    prefix_counts_N: Tensor | None  # |lambda_i(t)|


@dataclass
class LossOutput:
    loss: Tensor
    """The loss, a scalar. The losses of microbatches and ranks add up to the global loss."""
    surrogate_sums_B: Tensor
    """Sum sum_t l_{i,t} of each completion with its KL term, float64, detached."""
    credit_N: Tensor
    """Credit c of each trained token, detached
    (`learner.algorithm.credit.Credit.gradient_weight_N`)."""
    metrics: Metrics


def policy_loss(
    batch: CompletionBatch, config: AlgorithmConfig, correction_kind: str
) -> LossOutput:
    """Loss of `batch`; with no trained token it is 0 and still has a graph to run backward on."""
    tokens, axis = _trained_tokens(batch)
    dtype = tokens.logprobs_N.dtype
    sampled_N = ~tokens.behaviour_logprobs_N.isnan()
    gap_N = behaviour_gap(tokens.old_logprobs_N, tokens.behaviour_logprobs_N)
    anchor_N = anchor_logprobs(tokens, config.objective)
    inputs = CreditInputs(
        log_ratio_N=tokens.logprobs_N - anchor_N,
        behaviour_gap_N=gap_N,
        axis=axis,
        entropy_N=tokens.entropy_N,
        prefix_counts_N=tokens.prefix_counts_N,
    )
    credit = CREDITS.rule(config.credit)(inputs)
    terms = Terms(
        log_ratio_N=credit.log_ratio_N,
        logprobs_N=tokens.logprobs_N.detach(),
        advantages_B=batch.advantages_B.to(dtype),
        axis=axis,
        behaviour_gap_N=gap_N,
        anchor_logprobs_N=anchor_N,
    )
    surrogate = OBJECTIVES.rule(config.objective)(terms)
    chosen = replace(config.correction, kind=correction_kind)
    correction = correct(gap_N, sampled_N, axis, terms.advantages_N, chosen)
    policy_B = axis.sum(credit.weight_N * correction.weight_N * surrogate.values_N)
    kl_N = torch.zeros_like(gap_N)
    if tokens.reference_logprobs_N is not None:
        kl_N = k3(tokens.logprobs_N, tokens.reference_logprobs_N)
    beta = config.objective.kl if config.objective.kl_in == "loss" else 0.0
    kl_B = beta * axis.sum(credit.kl_weight_N * kl_N)
    weights_B = batch.token_weights_B.double()
    loss = -(weights_B * (policy_B - kl_B)).sum()
    own = {**credit.metrics, **surrogate.metrics, **correction.metrics}
    metrics = _token_metrics(tokens, credit, surrogate, gap_N, kl_N.detach(), own)
    policy, kl = torch.stack([-(weights_B * policy_B).sum(), (weights_B * kl_B).sum()]).tolist()
    metrics |= {"loss/policy": (policy, 0.0), "loss/kl": (kl, 0.0)}
    credit_N = credit.gradient_weight_N.detach()
    return LossOutput(loss.to(dtype), (policy_B - kl_B).detach(), credit_N, metrics)


def anchor_logprobs(tokens: CompletionBatch, config: ObjectiveConfig) -> Tensor:
    """Log-probabilities that ratios are to, [N]: those before the first update, or the sampler's.

    A token that the policy did not sample has none of the sampler: it keeps the former.
    """
    if config.anchor == "old":
        return tokens.old_logprobs_N
    given_N = tokens.behaviour_logprobs_N.isnan()
    return torch.where(given_N, tokens.old_logprobs_N, tokens.behaviour_logprobs_N)


def _trained_tokens(batch: CompletionBatch) -> tuple[CompletionBatch, PackedAxis]:
    """The batch without its masked tokens, and the axis of what is left."""
    mask_N = batch.loss_mask_N
    lengths_B = PackedAxis(batch.lengths_B).sum(mask_N).long()

    def trained(values_N: Tensor | None) -> Tensor | None:
        return None if values_N is None else values_N[mask_N]

    tokens = CompletionBatch(
        logprobs_N=batch.logprobs_N[mask_N],
        old_logprobs_N=batch.old_logprobs_N[mask_N],
        behaviour_logprobs_N=batch.behaviour_logprobs_N[mask_N],
        reference_logprobs_N=trained(batch.reference_logprobs_N),
        entropy_N=trained(batch.entropy_N),
        loss_mask_N=mask_N[mask_N],
        lengths_B=lengths_B,
        advantages_B=batch.advantages_B,
        token_weights_B=batch.token_weights_B,
        prefix_counts_N=trained(batch.prefix_counts_N),
    )
    return tokens, PackedAxis(lengths_B)


@torch.no_grad()
def _token_metrics(
    tokens: CompletionBatch,
    credit: Credit,
    surrogate: Surrogate,
    gap_N: Tensor,
    kl_N: Tensor,
    own: Mapping[str, Tensor],
) -> Metrics:
    """Means over trained tokens; `is_ratio` (pi_old / mu) and `logprob_gap` over sampled ones.

    Args:
        own: [N] each, from rules of the user's own.
    """
    sampled_N = ~tokens.behaviour_logprobs_N.isnan()
    every_N = torch.ones_like(sampled_N)
    means = {
        "clip_fraction": (surrogate.clipped_N, every_N),
        "is_ratio/mean": (bounded_exp(gap_N), sampled_N),
        "logprob_gap/mean": (gap_N.abs(), sampled_N),
        "credit/mean_weight": (credit.gradient_weight_N, every_N),
    }
    if tokens.entropy_N is not None:
        means["entropy/mean"] = (tokens.entropy_N, every_N)
    if tokens.reference_logprobs_N is not None:
        means["kl/mean"] = (kl_N, every_N)
    means |= {name: (values_N, every_N) for name, values_N in own.items()}
    # One transfer from the device for all of them.
    pairs = [
        torch.stack([(values_N.double() * over_N).sum(), over_N.sum().double()])
        for values_N, over_N in means.values()
    ]
    rows = torch.stack(pairs).tolist()
    return {name: (total, weight) for name, (total, weight) in zip(means, rows, strict=True)}
