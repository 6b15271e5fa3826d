"""Baselines beside those of GRPO's line: by the mean, a quantile, lengths, or the whole batch.

Legend: V completions with a reward, P groups. Evidence: [P] paper or official code, [3P] third
parties, [D] derived, [I] inferred.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from common.config.algorithm import BaselineConfig
from common.config.bounds import PositiveShare
from common.errors import VerifierError
from learner.algorithm.grouped import Advantages, GroupedRewards


def maxrl(grouped: GroupedRewards, config: BaselineConfig) -> Advantages:
    """(R - mean) / (mean + epsilon), arXiv 2602.02710 [P]; groups of mean 0 give 0.

    For rewards of 0 and 1 a prompt that is seldom answered counts more than under GRPO. The
    expected gradient is that of sum_k pass@k / k over k < G [D]. Rewards must not be negative.
    """
    _only(grouped.rewards_V, grouped.rewards_V >= 0, "maxrl", "of at least 0")
    return Advantages(grouped.centred_V / (grouped.mean_V + config.epsilon))


def disco(grouped: GroupedRewards, config: BaselineConfig) -> Advantages:
    """(R - p) / (p (1 - p)) with p the mean: DisCO-b, arXiv 2505.12366 [P].

    With `sequence_mean` its gradient is that of the mean score of right answers less that of wrong
    ones [D]. Rewards must be 0 or 1.
    """
    binary_V = (grouped.rewards_V == 0) | (grouped.rewards_V == 1)
    _only(grouped.rewards_V, binary_V, "disco", "of 0 and 1")
    spread_V = (grouped.mean_V * (1 - grouped.mean_V)).masked_fill(grouped.uniform_V, 1.0)
    return Advantages(grouped.centred_V / spread_V)


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
    return Advantages(grouped.centred_V / (_deviation(grouped.rewards_V) + config.epsilon))


def reinforce_pp(grouped: GroupedRewards, config: BaselineConfig) -> Advantages:
    """Rewards whitened over the batch: REINFORCE++, arXiv 2501.03262 [3P]."""
    return Advantages(_whitened(grouped.rewards_V, config.epsilon))


def reinforce_pp_baseline(grouped: GroupedRewards, config: BaselineConfig) -> Advantages:
    """R less the group's mean, whitened over the batch: REINFORCE++-baseline [3P]."""
    return Advantages(_whitened(grouped.centred_V, config.epsilon))


def _by_group(grouped: GroupedRewards) -> Tensor:
    """Indices of the completions, group after group, by rising reward within each."""
    order_V = grouped.rewards_V.argsort(stable=True)
    return order_V[grouped.group_V[order_V].argsort(stable=True)]


def _whitened(values_V: Tensor, epsilon: float) -> Tensor:
    if not values_V.numel():
        return values_V
    return (values_V - values_V.mean()) / (_deviation(values_V) + epsilon)


def _deviation(values_V: Tensor) -> Tensor:
    """Sample standard deviation; 0 for fewer than two values."""
    return values_V.std() if values_V.numel() > 1 else values_V.new_zeros(())


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
    "reinforce_pp": reinforce_pp,
    "reinforce_pp_baseline": reinforce_pp_baseline,
}
