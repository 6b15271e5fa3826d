"""The loss of a microbatch: credit, objective, correction and KL composed, one pass.

    x = log pi - log anchor  ->  credit  ->  objective  ->  * correction  ->  - beta * KL + c * H
    l_{i,t} = weight * correction * surrogate - kl_weight * beta * KL + c * H
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
from learner.algorithm.kl import ESTIMATORS
from learner.algorithm.objectives import OBJECTIVES
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
    entropy_N: Tensor | None  # of the policy being trained, nats; a bonus needs its gradient
    loss_mask_N: Tensor  # bool
    lengths_B: Tensor  # long, all tokens of the completion, masked ones included
    advantages_B: Tensor
    token_weights_B: Tensor  # w_i, from the aggregation over the whole global batch
    prefix_counts_N: Tensor | None  # |lambda_i(t)|
    advantages_N: Tensor | None = None
    """Advantages of tokens, where those of a completion may differ."""
    turn_N: Tensor | None = None
    """Place of each token's turn in its completion, long; None: every completion is one turn."""
    credit_chosen_N: Tensor | None = None
    """Tokens that the rule of this axis has chosen, bool (`learner.algorithm.choices`)."""
    objective_chosen_N: Tensor | None = None
    correction_chosen_N: Tensor | None = None
    update_N: Tensor | None = None
    """Tokens that this update is for, bool; None: all. The others keep their place in every mean
    and denominator, and add nothing to the loss."""
    elsewhere_B: Tensor | None = None
    """Completions that were sampled behind another prompt than this one, bool; None: none was."""
    likelihood_weights_B: Tensor | None = None
    """Weight of each token's log-likelihood in the loss, by completion; None: there is none."""


@dataclass
class LossOutput:
    loss: Tensor
    """The loss, a scalar. The losses of microbatches and ranks add up to the global loss."""
    surrogate_sums_B: Tensor
    """Sum sum_t l_{i,t} of each completion with its KL term, float64, detached."""
    credit_N: Tensor
    """Credit c of each trained token, detached
    (`learner.algorithm.credit.Credit.gradient_weight_N`)."""
    advantages_N: Tensor | None
    """What each trained token is credited with, detached, where tokens differ in advantage; None:
    the advantage of its completion times its credit."""
    metrics: Metrics


def policy_loss(
    batch: CompletionBatch, config: AlgorithmConfig, correction_kind: str
) -> LossOutput:
    """Loss of `batch`; with no trained token it is 0 and still has a graph to run backward on."""
    tokens, axis = _trained_tokens(batch)
    dtype = tokens.logprobs_N.dtype
    sampled_N = sampled_here(tokens, axis)
    sampler_gap_N = behaviour_gap(tokens.old_logprobs_N, tokens.behaviour_logprobs_N)
    gap_N = sampler_gap_N.masked_fill(~sampled_N, 0.0)
    anchor_N = anchor_logprobs(tokens, config.objective)
    log_ratio_N = tokens.logprobs_N - anchor_N
    inputs = CreditInputs(
        log_ratio_N=log_ratio_N,
        behaviour_gap_N=gap_N,
        axis=axis,
        entropy_N=None if tokens.entropy_N is None else tokens.entropy_N.detach(),
        prefix_counts_N=tokens.prefix_counts_N,
        logprobs_N=tokens.logprobs_N.detach(),
        old_logprobs_N=tokens.old_logprobs_N,
        chosen_N=tokens.credit_chosen_N,
        advantages_N=tokens.advantages_N,
    )
    credit = _of_update(CREDITS.rule(config.credit)(inputs), tokens.update_N)
    terms = Terms(
        log_ratio_N=credit.log_ratio_N,
        logprobs_N=tokens.logprobs_N.detach(),
        advantages_B=batch.advantages_B.to(dtype),
        axis=axis,
        behaviour_gap_N=gap_N,
        anchor_logprobs_N=anchor_N,
        token_advantages_N=_first(credit.advantages_N, tokens.advantages_N),
        chosen_N=tokens.objective_chosen_N,
        elsewhere_gap_N=None if batch.elsewhere_B is None else sampler_gap_N - gap_N,
        elsewhere_B=batch.elsewhere_B,
    )
    surrogate = OBJECTIVES.rule(config.objective)(terms)
    chosen, told_N = replace(config.correction, kind=correction_kind), tokens.correction_chosen_N
    correction = correct(gap_N, sampled_N, axis, terms.advantages_N, chosen, told_N)
    policy_B = axis.sum(credit.weight_N * correction.weight_N * surrogate.values_N)
    kl_N = _kl(tokens, log_ratio_N, config.objective)
    beta = config.objective.kl if config.objective.kl_in == "loss" else 0.0
    sums_B = {"loss/policy": policy_B, "loss/kl": -beta * axis.sum(credit.kl_weight_N * kl_N)}
    if config.objective.entropy > 0 and tokens.entropy_N is not None:
        sums_B["loss/entropy"] = config.objective.entropy * axis.sum(_of_own(tokens, "entropy_N"))
    weights_B = batch.token_weights_B.double()
    total_B = sum(sums_B.values(), torch.zeros_like(policy_B))
    own = {**credit.metrics, **surrogate.metrics, **correction.metrics}
    metrics = _token_metrics(tokens, sampled_N, credit, surrogate, gap_N, kl_N.detach(), own)
    parts = torch.stack([-(weights_B * each_B).sum() for each_B in sums_B.values()]).tolist()
    # Without a KL term the sum is -0: plus 0 is what people expect to read.
    metrics |= {name: (part + 0.0, 0.0) for name, part in zip(sums_B, parts, strict=True)}
    credit_N = credit.gradient_weight_N.detach()
    given_N = None
    if tokens.advantages_N is not None:
        given_N = _first(credit.gradient_advantages_N, tokens.advantages_N * credit_N)
    loss = -(weights_B * total_B).sum()
    if batch.likelihood_weights_B is not None:
        loss = loss + _likelihood_loss(batch.likelihood_weights_B, tokens, axis, metrics)
    return LossOutput(loss.to(dtype), total_B.detach(), credit_N, given_N, metrics)


def _likelihood_loss(
    weights_B: Tensor, tokens: CompletionBatch, axis: PackedAxis, metrics: Metrics
) -> Tensor:
    """Minus the weighted sum of log pi of the tokens of the update, a scalar; it is a metric."""
    loss = -(weights_B.double() * axis.sum(_of_own(tokens, "logprobs_N"))).sum()
    metrics["loss/likelihood"] = (float(loss.detach()), 0.0)
    return loss


def _of_own(tokens: CompletionBatch, column: str) -> Tensor:
    """A column with 0 for the tokens that another update is for."""
    values_N: Tensor = getattr(tokens, column)
    return values_N if tokens.update_N is None else values_N * tokens.update_N


def _of_update(credit: Credit, update_N: Tensor | None) -> Credit:
    """`credit` without the tokens that another update is for."""
    if update_N is None:
        return credit
    given_N = credit.gradient_advantages_N
    return replace(
        credit,
        weight_N=credit.weight_N * update_N,
        kl_weight_N=credit.kl_weight_N * update_N,
        gradient_weight_N=credit.gradient_weight_N * update_N,
        gradient_advantages_N=None if given_N is None else given_N * update_N,
    )


def _first(one_N: Tensor | None, other_N: Tensor | None) -> Tensor | None:
    return other_N if one_N is None else one_N


def _kl(tokens: CompletionBatch, log_ratio_N: Tensor, config: ObjectiveConfig) -> Tensor:
    """The estimate of the KL to the reference, [N]; 0 where there is none."""
    if tokens.reference_logprobs_N is None:
        return torch.zeros_like(log_ratio_N.detach())
    estimate = ESTIMATORS[config.kl_estimator]
    return estimate(tokens.logprobs_N, tokens.reference_logprobs_N, log_ratio_N)


def anchor_logprobs(tokens: CompletionBatch, config: ObjectiveConfig) -> Tensor:
    """Log-probabilities that ratios are to, [N]: those before the first update, or the sampler's.

    A token that the policy did not sample, or sampled behind another prompt, has none of the
    sampler: it keeps the former.
    """
    if config.anchor == "old":
        return tokens.old_logprobs_N
    sampled_N = sampled_here(tokens, PackedAxis(tokens.lengths_B))
    return torch.where(sampled_N, tokens.behaviour_logprobs_N, tokens.old_logprobs_N)


def sampled_here(tokens: CompletionBatch, axis: PackedAxis) -> Tensor:
    """Tokens that were sampled behind the prompt that they are trained behind, [N] bool."""
    sampled_N = ~tokens.behaviour_logprobs_N.isnan()
    if tokens.elsewhere_B is None:
        return sampled_N
    return sampled_N & ~axis.spread(tokens.elsewhere_B)


def _trained_tokens(batch: CompletionBatch) -> tuple[CompletionBatch, PackedAxis]:
    """The batch without its masked tokens, and the axis of what is left."""
    mask_N = batch.loss_mask_N
    lengths_B = PackedAxis(batch.lengths_B).sum(mask_N).long()

    def trained(values_N: Tensor | None) -> Tensor | None:
        return None if values_N is None else values_N[mask_N]

    advantages_N = trained(batch.advantages_N)
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
        advantages_N=None if advantages_N is None else advantages_N.to(batch.logprobs_N.dtype),
        credit_chosen_N=trained(batch.credit_chosen_N),
        objective_chosen_N=trained(batch.objective_chosen_N),
        correction_chosen_N=trained(batch.correction_chosen_N),
        update_N=trained(batch.update_N),
        elsewhere_B=batch.elsewhere_B,
    )
    return tokens, PackedAxis(lengths_B, trained(batch.turn_N))


@torch.no_grad()
def _token_metrics(
    tokens: CompletionBatch,
    sampled_N: Tensor,
    credit: Credit,
    surrogate: Surrogate,
    gap_N: Tensor,
    kl_N: Tensor,
    own: Mapping[str, Tensor],
) -> Metrics:
    """Means over the tokens of the update; `is_ratio` (pi_old / mu) and `logprob_gap` over those
    that were sampled.

    Args:
        sampled_N: tokens that were sampled behind the prompt that they are trained behind.
        own: [N] each, from rules of the user's own.
    """
    every_N = torch.ones_like(sampled_N) if tokens.update_N is None else tokens.update_N
    sampled_N = sampled_N & every_N
    means = {
        "clip_fraction": (surrogate.clipped_N, every_N),
        "is_ratio/mean": (bounded_exp(gap_N), sampled_N),
        "logprob_gap/mean": (gap_N.abs(), sampled_N),
        "credit/mean_weight": (credit.gradient_weight_N, every_N),
    }
    if tokens.entropy_N is not None:
        means["entropy/mean"] = (tokens.entropy_N.detach(), every_N)
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
