"""Baselines beside those of GRPO's line: by mean, quantile, length, verifier, or the whole batch.

Legend: V completions with a reward, P groups. Evidence: [P] paper or official code, [3P] third
parties, [D] derived, [I] inferred.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from common.config.algorithm import BaselineConfig
from common.config.bounds import Positive, PositiveShare
from common.errors import VerifierError
from learner.algorithm.grouped import Advantages, GroupedRewards, RewardPart, deviation


def maxrl(grouped: GroupedRewards, config: BaselineConfig) -> Advantages:
    """(R - mean) / (mean + epsilon), arXiv 2602.02710 [P]; groups of mean 0 give 0.

    For rewards of 0 and 1 a prompt that is seldom answered counts more than under GRPO. The
    expected gradient is that of sum_k pass@k / k over k < G [D]. Rewards must not be negative.
    """
    _only(grouped.rewards_V, grouped.rewards_V >= 0, "maxrl", "of at least 0")
    return Advantages(grouped.centred_V / (grouped.mean_V + config.epsilon))


def disco(
    grouped: GroupedRewards,
    config: BaselineConfig,
    *,
    negatives: Literal["mean", "softmax"] = "mean",
    temperature: Positive = 10.0,
) -> Advantages:
    """(R - p) / (p (1 - p)) with p the mean: DisCO-b, arXiv 2505.12366 [P].

    With `sequence_mean` its gradient is that of the mean score of right answers less that of wrong
    ones [D]. Under `softmax` the latter is tau log mean e^(s / tau), so that the wrong answers that
    the policy is surest of are pushed down most: DisCO itself [P], whose tau is 10. s is the mean
    log-probability of an answer, here under the policy that sampled it [I]: the same at staleness
    0. Rewards must be 0 or 1.
    """
    binary_V = (grouped.rewards_V == 0) | (grouped.rewards_V == 1)
    _only(grouped.rewards_V, binary_V, "disco", "of 0 and 1")
    if negatives == "mean":
        spread_V = (grouped.mean_V * (1 - grouped.mean_V)).masked_fill(grouped.uniform_V, 1.0)
        return Advantages(grouped.centred_V / spread_V)
    if grouped.scores_V is None:
        raise ValueError("baseline `disco` with negatives=softmax needs scores_V")
    wrong_V = grouped.rewards_V == 0
    scaled_V = (grouped.scores_V / temperature).masked_fill(~wrong_V, -math.inf)
    highest_P = scaled_V.new_zeros(grouped.groups).scatter_reduce(
        0, grouped.group_V, scaled_V, "amax", include_self=False
    )
    powers_V = (scaled_V - highest_P[grouped.group_V]).exp().masked_fill(~wrong_V, 0.0)
    share_V = powers_V / grouped.sum(powers_V).masked_fill(grouped.uniform_V, 1.0)
    right_V = 1 / grouped.mean_V.masked_fill(grouped.uniform_V, 1.0)
    advantages_V = torch.where(wrong_V, -grouped.size_V * share_V, right_V)
    return Advantages(advantages_V.masked_fill(grouped.uniform_V, 0.0))


def quantile(
    grouped: GroupedRewards, config: BaselineConfig, *, quantile: PositiveShare = 0.4
) -> Advantages:
    """(R - Q) / (std + epsilon), Q the group's quantile of rewards: QAE, arXiv 2509.22611 [P].

    Q is a reward that occurred: the inverse of the empirical distribution. For rewards of 0 and 1
    a hard prompt reinforces its right answers alone, an easy one punishes its wrong ones alone.
    That the deviation stays is [I]; 0.4 is ours, the paper's value was not found.
    """
    if not grouped.rewards_V.numel():
        return Advantages(grouped.rewards_V)
    sizes_P = torch.bincount(grouped.group_V, minlength=grouped.groups)
    # Less a hair, since 0.4 * 5 may come out above 2.
    place_P = (sizes_P * quantile - 1e-9).ceil().long().clamp(min=1) - 1
    first_P = sizes_P.cumsum(0) - sizes_P
    sorted_V = grouped.rewards_V[_by_group(grouped)]
    levels_P = sorted_V[(first_P + place_P).clamp(max=len(sorted_V) - 1)]
    off_V = grouped.rewards_V - levels_P[grouped.group_V]
    return Advantages(off_V / (grouped.deviation_V + config.epsilon))


def opo(grouped: GroupedRewards, config: BaselineConfig) -> Advantages:
    """R less the group's mean weighted by length: OPO, arXiv 2505.23585 [3P].

    It is the baseline of least variance where the gradient of a completion grows with its length.
    """
    lengths_V = grouped.lengths_V.double()
    weighed_V = grouped.sum(lengths_V * grouped.rewards_V) / grouped.sum(lengths_V).clamp(min=1)
    return Advantages((grouped.rewards_V - weighed_V).masked_fill(grouped.uniform_V, 0.0))


def pass_at_k(grouped: GroupedRewards, config: BaselineConfig) -> Advantages:
    """The best completion of a group gets best - second best, the others 0: verl's pass@k [3P]."""
    advantages_V = torch.zeros_like(grouped.rewards_V)
    sizes = torch.bincount(grouped.group_V, minlength=grouped.groups).tolist()
    for members in _by_group(grouped).split(sizes):
        if len(members) > 1:
            second, best = grouped.rewards_V[members[-2:]]
            advantages_V[members[-1]] = best - second
    return Advantages(advantages_V)


def batch_std(grouped: GroupedRewards, config: BaselineConfig) -> Advantages:
    """(R - group mean) / (std of all rewards of the batch + epsilon): TRL's `batch` scale [3P]."""
    return Advantages(grouped.centred_V / (deviation(grouped.rewards_V) + config.epsilon))


def reinforce_pp(grouped: GroupedRewards, config: BaselineConfig) -> Advantages:
    """Rewards whitened over the batch: REINFORCE++, arXiv 2501.03262 [3P]."""
    return Advantages(_whitened(grouped.rewards_V, config.epsilon))


def reinforce_pp_baseline(grouped: GroupedRewards, config: BaselineConfig) -> Advantages:
    """R less the group's mean, whitened over the batch: REINFORCE++-baseline [3P]."""
    return Advantages(_whitened(grouped.centred_V, config.epsilon))


def gdpo(grouped: GroupedRewards, config: BaselineConfig) -> Advantages:
    """Every verifier's rewards standardised within the group, then summed: GDPO, arXiv 2601.05242.

    A_i = sum_k w_k (R_ik - mean_k) / (std_k + epsilon), over their deviation in the batch [P]. So a
    verifier of large rewards does not drown the others, and one that gives all the same counts for
    nothing. The deviation is over completions, as in TRL; verl takes it over tokens, which moves
    groups of equal rewards off 0 where lengths differ [3P]. Penalties of the reward are a part too.
    """
    sums_V = torch.zeros_like(grouped.rewards_V)
    for part in grouped.parts or (RewardPart(grouped.rewards_V, 1.0),):
        alone = replace(grouped, rewards_V=part.values, parts=())
        sums_V = sums_V + part.weight * alone.centred_V / (alone.deviation_V + config.epsilon)
    # The mean over the batch is that over groups, each of which is 0.
    return Advantages(sums_V / (deviation(sums_V) + config.epsilon))


def remax(grouped: GroupedRewards, config: BaselineConfig) -> Advantages:
    """R less the reward of the group's greedy completion: ReMax, arXiv 2310.10505 [P].

    A group whose greedy completion has no reward has nothing to compare with, and is left out.
    """
    nobody_V = torch.zeros_like(grouped.group_V)
    greedy_V = (nobody_V if grouped.compared_V is None else grouped.compared_V).double()
    count_V = grouped.sum(greedy_V)
    baseline_V = grouped.sum(greedy_V * grouped.rewards_V) / count_V.clamp(min=1)
    return Advantages(grouped.rewards_V - baseline_V, count_V > 0)


def _by_group(grouped: GroupedRewards) -> Tensor:
    """Indices of the completions, group after group, by rising reward within each."""
    order_V = grouped.rewards_V.argsort(stable=True)
    return order_V[grouped.group_V[order_V].argsort(stable=True)]


def _whitened(values_V: Tensor, epsilon: float) -> Tensor:
    if not values_V.numel():
        return values_V
    return (values_V - values_V.mean()) / (deviation(values_V) + epsilon)


def _only(rewards_V: Tensor, right_V: Tensor, kind: str, wanted: str) -> None:
    """Raise `VerifierError` for the first reward that a baseline has no meaning for."""
    wrong_V = rewards_V[~right_V]
    if wrong_V.numel():
        raise VerifierError(
            f"algorithm.baseline.kind={kind} takes rewards {wanted}, and a completion has "
            f"{float(wrong_V[0]):g}: use another baseline, or change the weights of verifier.rules "
            "and algorithm.rollout.overlong_penalty_share, which make the reward"
        )


MORE_BASELINES: dict[str, Callable[[GroupedRewards, BaselineConfig], Advantages]] = {
    "maxrl": maxrl,
    "disco": disco,
    "quantile": quantile,
    "opo": opo,
    "pass_at_k": pass_at_k,
    "batch_std": batch_std,
    "gdpo": gdpo,
    "reinforce_pp": reinforce_pp,
    "reinforce_pp_baseline": reinforce_pp_baseline,
    "remax": remax,
}
