"""Slow and obvious versions of the learner's maths, and random cases, for the tests.

Legend: B completions, T tokens of one completion, N tokens of all, back to back.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from common.config.algorithm import (
    AdvantageConfig,
    AggregationConfig,
    AlgorithmConfig,
    BaselineConfig,
    CorrectionConfig,
    CreditConfig,
    ObjectiveConfig,
    RolloutConfig,
)
from learner.algorithm.loss import CompletionBatch

lengths = st.lists(st.integers(0, 40), min_size=1, max_size=7)
decays = st.sampled_from([0.0, 0.3, 0.9, 0.99, 1.0])
seeds = st.integers(0, 2**31)


def random(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(size: int, generator: torch.Generator, scale: float = 1.0) -> Tensor:
    return torch.randn(size, generator=generator, dtype=torch.float64) * scale


def dense_kernel(kind: str, length: int, decay: float) -> Tensor:
    """K(t, k) straight from the definition, [T, T]."""
    kernel = torch.zeros(length, length, dtype=torch.float64)
    for t in range(length):
        for k in range(t + 1):
            kernel[t, k] = {
                "recent": decay ** (t - k),
                "both": max(decay ** (t - k), decay**k),
                "terminal": decay ** (t - k) if t == length - 1 else 0.0,
            }[kind]
    return kernel


def slow_suffix(gap_T: Tensor, by_factor: bool = False) -> Tensor:
    """min(1, prod_(j > k) rho_j) of one completion, token by token; or prod min(1, rho_j)."""
    found = []
    for k in range(len(gap_T)):
        product = 1.0
        for rho in gap_T[k + 1 :].exp().tolist():
            product *= min(1.0, rho) if by_factor else rho
        found.append(min(1.0, product))
    return torch.tensor(found, dtype=torch.float64)


def algorithm(**axes: dict[str, Any]) -> AlgorithmConfig:
    """`algorithm(credit={"kind": ...}, objective={...})`."""
    return AlgorithmConfig(
        rollout=RolloutConfig(**axes.get("rollout", {})),
        baseline=BaselineConfig(**axes.get("baseline", {})),
        advantage=AdvantageConfig(**axes.get("advantage", {})),
        credit=CreditConfig(**axes.get("credit", {})),
        objective=ObjectiveConfig(**axes.get("objective", {})),
        correction=CorrectionConfig(**axes.get("correction", {})),
        aggregation=AggregationConfig(**axes.get("aggregation", {})),
    )


def random_batch(seed: int, sizes: list[int], on_policy: bool = False) -> CompletionBatch:
    """A batch with masked tokens, guidance (NaN behaviour) and log-ratios on both clip sides."""
    generator = random(seed)
    total = sum(sizes)
    logprobs_N = -normal(total, generator).abs() - 0.01
    old_N = logprobs_N.clone() if on_policy else logprobs_N + normal(total, generator, 0.2)
    behaviour_N = old_N.clone() if on_policy else old_N + normal(total, generator, 0.3)
    mask_N = torch.rand(total, generator=generator) < 0.8
    behaviour_N[~mask_N & (torch.rand(total, generator=generator) < 0.5)] = float("nan")
    return CompletionBatch(
        logprobs_N=logprobs_N.requires_grad_(),
        old_logprobs_N=old_N,
        behaviour_logprobs_N=behaviour_N,
        reference_logprobs_N=old_N + normal(total, generator, 0.3),
        entropy_N=normal(total, generator).abs(),
        loss_mask_N=mask_N,
        lengths_B=torch.tensor(sizes, dtype=torch.long),
        advantages_B=normal(len(sizes), generator),
        token_weights_B=torch.rand(len(sizes), generator=generator, dtype=torch.float64),
        prefix_counts_N=torch.randint(1, 5, (total,), generator=generator).double(),
        credit_chosen_N=torch.rand(total, generator=generator) < 0.4,
        objective_chosen_N=torch.rand(total, generator=generator) < 0.4,
        correction_chosen_N=torch.rand(total, generator=generator) < 0.4,
    )


def take(batch: CompletionBatch, index: list[int]) -> CompletionBatch:
    """The completions `index` of `batch`, in that order."""
    parts = torch.arange(int(batch.lengths_B.sum())).split(batch.lengths_B.tolist())
    tokens = torch.cat([parts[i] for i in index]) if index else torch.zeros(0, dtype=torch.long)
    fields = {}
    for name, value in vars(batch).items():
        along = torch.tensor(index, dtype=torch.long) if name.endswith("_B") else tokens
        fields[name] = None if value is None else value[along]
    return CompletionBatch(**fields)


def slow_loss(batch: CompletionBatch, config: AlgorithmConfig, correction: str) -> Tensor:
    """The loss, one completion at a time, with dense traces."""
    total = batch.logprobs_N.sum() * 0
    for i in range(len(batch.lengths_B)):
        one = take(batch, [i])
        total = total - batch.token_weights_B[i] * slow_sum(one, config, correction)
    return total


def slow_sum(one: CompletionBatch, config: AlgorithmConfig, correction: str) -> Tensor:
    """sum_t l_t of a single completion."""
    mask = one.loss_mask_N
    if not mask.any():
        return one.logprobs_N.sum() * 0
    logp, old, mu = one.logprobs_N[mask], one.old_logprobs_N[mask], one.behaviour_logprobs_N[mask]
    advantage = one.advantages_B[0]
    anchor = old
    if config.objective.anchor == "behaviour":
        anchor = torch.where(mu.isnan(), old, mu)
    x, gap = logp - anchor, torch.nan_to_num(old - mu, nan=0.0)
    z, weight, kl_weight = slow_credit(one, config.credit, x, gap)
    picked = one.objective_chosen_N[mask]
    values = slow_objective(config.objective, z, logp, advantage, anchor, picked)
    c = config.correction
    ratio = (gap.sum() * torch.ones_like(gap) if c.level == "sequence" else gap).exp()
    factor = {
        "none": torch.ones_like(ratio),
        "tis": ratio.clamp(max=c.cap),
        "icepop": torch.where(
            (ratio < c.args.get("low", 0.5)) | (ratio > c.args.get("high", 5.0)), 0.0, ratio
        ),
        "sequence_mask": ratio * float(gap.sum().exp() <= c.args.get("high", 3.0)),
        "off_policy_mask": torch.ones_like(ratio)
        * float(advantage >= 0 or -gap.sum() / (~mu.isnan()).sum() <= c.args.get("gap", 0.5)),
        "topr": torch.ones_like(ratio) if advantage > 0 else ratio.clamp(max=1.0),
        "m2po": torch.where(one.correction_chosen_N[mask], 0.0, 1.0).double(),
    }[correction]
    factor = torch.where(mu.isnan(), 1.0, factor)
    kl = slow_kl(config.objective, one.reference_logprobs_N[mask] - logp, x)
    bonus = config.objective.entropy * one.entropy_N[mask]
    return (weight * factor * values - kl_weight * config.objective.kl * kl + bonus).sum()


def slow_kl(config: ObjectiveConfig, d: Tensor, x: Tensor) -> Tensor:
    k3 = d.exp() - d - 1
    return {
        "k1": -d,
        "k2": d**2 / 2,
        "k3": k3,
        "straight_through": d**2 / 2 + (k3 - d**2 / 2).detach(),
        "unbiased": x.exp() * k3,
    }[config.kl_estimator]


def slow_credit(
    one: CompletionBatch, config: CreditConfig, x: Tensor, gap: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    ones = torch.ones_like(x)
    if config.kind == "broadcast":
        return x, ones, ones
    if config.kind == "prefix_sets":
        share = 1 / one.prefix_counts_N[one.loss_mask_N]
        return x, share, share
    if config.kind == "top_entropy":
        return x, one.credit_chosen_N[one.loss_mask_N].double(), ones
    if config.kind == "probability":
        alpha = config.args.get("alpha", 0.2)
        return x, 1 - alpha * (1 - one.old_logprobs_N[one.loss_mask_N].exp().clamp(max=1)), ones
    if config.kind == "probability_sigmoid":
        p = one.logprobs_N.detach()[one.loss_mask_N].exp()
        return x, (2 / (1 + (-9 * (p - 0.25)).exp())).clamp(1, 1.4), ones
    kernel = dense_kernel(config.trace, len(x), config.gamma * config.lambda_)
    if config.entropy_quantile > 0:
        entropy = one.entropy_N[one.loss_mask_N]
        threshold = entropy.sort().values[int(config.entropy_quantile * len(x))]
        kernel = kernel * (entropy >= threshold)
    if config.args.get("weighted_mean"):
        sums = kernel.sum(1, keepdim=True)
        kernel = kernel / torch.where(sums == 0, 1.0, sums)
    mean = kernel.sum(0).mean()
    scale = 1 / mean if config.normalize == "mean" and mean > 0 else torch.tensor(1.0)
    if config.cut:
        kernel = kernel * slow_suffix(gap, config.args.get("cut_by_factor", False))
    c = kernel.sum(0)
    if config.application == "weight":
        return x, c * scale, ones
    rows = ones.clone()
    if config.trace == "terminal":
        rows[:-1] = 0
    return kernel @ x, rows * scale, ones


def slow_objective(
    config: ObjectiveConfig,
    z: Tensor,
    logp: Tensor,
    advantage: Tensor,
    anchor: Tensor,
    picked: Tensor,
) -> Tensor:
    low, high = config.clip_low, config.clip_high
    if config.kind == "gspo":
        z = z.mean().expand_as(z)
    if config.kind == "kl_cov":
        return z.exp() * advantage - torch.where(picked, z.abs(), 0.0)
    if config.kind in ("ppo", "gspo", "clip_cov"):
        clipped = z.exp().clamp(1 - low, 1 + high)
        found = torch.min(z.exp() * advantage, clipped * advantage)
        if config.kind == "clip_cov":
            return torch.where(picked, 0.0, found)
        c = config.args.get("dual_clip", math.inf)
        return found if advantage >= 0 else torch.max(found, c * advantage)
    policy = logp.detach() + z - z.detach()
    if config.kind == "sapo":
        tau = 1.0 if advantage > 0 else 1.05
        return torch.sigmoid(tau * (z.exp() - 1)) * 4 / tau * advantage
    if config.kind == "dppo":
        return slow_dppo(config, z, logp.detach(), anchor, advantage) * policy
    if config.kind == "vespo":
        k, decay = (2.0, 3.0) if advantage >= 0 else (3.0, 2.0)
        whole = z.detach().sum().exp()
        return whole**k * (decay * (1 - whole)).exp() * advantage * policy
    if config.kind == "dro":
        return advantage * policy - 0.05 * z**2
    if config.kind == "gmpo":
        sign = advantage.sign()
        bound = high if advantage > 0 else low
        pessimistic = sign * torch.minimum(sign * z, torch.full_like(z, bound))
        return (pessimistic.mean().exp() * advantage).expand_as(z)
    scale = z.exp().clamp(1 - low, 1 + high) if config.kind == "cispo" else torch.ones_like(z)
    return scale.detach() * advantage * policy


def slow_dppo(
    config: ObjectiveConfig, z: Tensor, logp: Tensor, anchor: Tensor, advantage: Tensor
) -> Tensor:
    """A min(r, 20) of the tokens within the bound, else 0."""
    m, p = anchor.exp(), logp.exp()
    if config.args.get("divergence") == "kl":
        moved = m * (m / p).log() + (1 - m) * ((1 - m + 1e-8) / (1 - p + 1e-8)).log()
    else:
        moved = (p - m).abs()
    against = p > m if advantage > 0 else p < m
    far = against & (moved > (config.clip_high if advantage > 0 else config.clip_low))
    return torch.where(far, 0.0, z.detach().exp().clamp(max=20.0) * advantage)
