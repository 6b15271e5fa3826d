"""The learner's share of the rollout axis: rewards by length, and which completions are kept.

    overlong_penalty   DAPO's soft punishment near the length limit
    by_keys            PODS: chosen by reward, before advantages are computed;
                       CPPO: chosen by advantage, after; and DAPO's mask of truncated completions
    ROLLOUTS           a rule of a user's own, which chooses among what these leave

A rule is called twice a step, before and after the advantages: `Sampled.advantages_B` is None the
first time. What the first call leaves out has no part in a baseline; what the second leaves out had
one. Which prompts are sampled at all (`dynamic_sampling`, `guidance`) is decided by the actors.

Legend: B completions of the global batch, G completions of one group.
Evidence: [P] paper or official code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from common.config.algorithm import RolloutConfig
from learner.algorithm.axis import Axis, number_problem, tensor_problem


@dataclass(frozen=True)
class Sampled:
    """The completions of a step, for a rule that chooses among them; all [B]."""

    rewards_B: Tensor  # float64, with the overlong penalty; NaN where there is none
    group_B: Tensor  # long, the index of each completion's group
    lengths_B: Tensor  # long, all tokens of each completion
    truncated_B: Tensor  # bool, cut at the limit
    kept_B: Tensor  # bool, not left out before
    advantages_B: Tensor | None = None
    """Advantages, float64; None while they are still to be computed."""

    def members(self) -> list[Tensor]:
        """Indices of the kept completions of each group; groups without any are left out."""
        found = [
            (self.kept_B & (self.group_B == group)).nonzero()[:, 0]
            for group in self.group_B.unique()
        ]
        return [members for members in found if len(members)]


@dataclass(frozen=True)
class Chosen:
    """Which completions a rule keeps."""

    kept_B: Tensor  # bool; a completion that was left out before stays out
    metrics: Mapping[str, float] = field(default_factory=dict)


def overlong_penalty(lengths_B: Tensor, limit: int, share: float) -> Tensor:
    """0 up to a window before the limit, then linear down to -1 at the limit; float64 [B].

    The window is `share` of the limit, as a whole number of tokens; 0 gives zeros.
    DAPO, arXiv 2503.14476, section 3.4 [P], with a window of 4096 of 20480 tokens. `lengths_B` are
    whole completions in tokens.
    """
    if share == 0:
        return torch.zeros(lengths_B.shape, dtype=torch.float64)
    window = max(1, round(limit * share))
    return ((limit - window - lengths_B.double()) / window).clamp(-1.0, 0.0)


def by_keys(sampled: Sampled, config: RolloutConfig) -> Tensor:
    """What `max_variance_share`, `prune_rate` and `mask_truncated` leave of the kept, [B] bool."""
    if sampled.advantages_B is None:
        return _of_most_variance(sampled, config)
    return _of_largest_advantage(sampled, sampled.advantages_B, config)


def _of_most_variance(sampled: Sampled, config: RolloutConfig) -> Tensor:
    """Keep the completions of most reward variance in each group (PODS)."""
    if config.max_variance_share == 1:
        return sampled.kept_B
    chosen_B = torch.zeros_like(sampled.kept_B)
    for members in sampled.members():
        size = int((sampled.group_B == sampled.group_B[members[0]]).sum())
        keep = min(max(1, round(config.max_variance_share * size)), len(members))
        chosen_B[members] = max_variance_subset(sampled.rewards_B[members], keep)
    return chosen_B


def _of_largest_advantage(sampled: Sampled, advantages_B: Tensor, config: RolloutConfig) -> Tensor:
    """Keep the largest advantages of each group (CPPO), and mask truncated completions (DAPO)."""
    chosen_B = sampled.kept_B.clone()
    if config.prune_rate > 0:
        chosen_B = torch.zeros_like(sampled.kept_B)
        for members in sampled.members():
            chosen_B[members] = prune_by_advantage(advantages_B[members], config.prune_rate)
    if config.mask_truncated:
        chosen_B &= ~sampled.truncated_B
    return chosen_B


def max_variance_subset(rewards_G: Tensor, keep: int) -> Tensor:
    """PODS (arXiv 2504.13818 [P]): the `keep` of G completions of most reward variance, [G] bool.

    The best subset is the i highest and the keep - i lowest rewards for some i, so scanning i
    after one sort is exact. Advantages are normalised over the kept ones afterwards.
    Raises `ValueError` unless 1 <= keep <= G.
    """
    size = rewards_G.numel()
    if not 1 <= keep <= size:
        raise ValueError(f"cannot keep {keep} of {size} completions")
    order_G = rewards_G.argsort(stable=True)
    # Centred first: the variance is a small difference of large sums otherwise.
    centred_G = (rewards_G - rewards_G.mean()).double()[order_G]
    highest = torch.arange(keep + 1)
    moments = []
    for values_G in (centred_G, centred_G**2):
        prefix = torch.cat([values_G.new_zeros(1), values_G.cumsum(0)])
        moments.append(prefix[keep - highest] + prefix[size] - prefix[size - highest])
    variance = moments[1] / keep - (moments[0] / keep) ** 2
    best = int(variance.argmax())
    mask_G = torch.zeros_like(rewards_G, dtype=torch.bool)
    mask_G[order_G[: keep - best]] = True
    mask_G[order_G[size - best :]] = True
    return mask_G


def prune_by_advantage(advantages_G: Tensor, rate: float) -> Tensor:
    """CPPO (arXiv 2503.22342 [P]): keep the floor(G (1 - rate)) largest |advantages|, [G] bool.

    The advantages are those of the whole group; ties keep the earlier completion.
    Raises `ValueError` unless 0 <= rate < 1.
    """
    if not 0 <= rate < 1:
        raise ValueError(f"pruning rate {rate} is outside [0, 1)")
    # Rounded, because G * (1 - rate) in floating point may fall just short of an integer.
    keep = int(round(advantages_G.numel() * (1 - rate), 9))
    mask_G = torch.zeros_like(advantages_G, dtype=torch.bool)
    mask_G[advantages_G.abs().argsort(descending=True, stable=True)[:keep]] = True
    return mask_G


def _all(sampled: Sampled, config: RolloutConfig) -> Chosen:
    return Chosen(sampled.kept_B)


def _made_up(advantages: list[float] | None, size: int) -> Sampled:
    return Sampled(
        rewards_B=torch.arange(size, dtype=torch.float64),
        group_B=torch.zeros(size, dtype=torch.long),
        lengths_B=torch.arange(1, size + 1),
        truncated_B=torch.arange(size) > 1,
        kept_B=torch.ones(size, dtype=torch.bool),
        advantages_B=None if advantages is None else torch.tensor(advantages, dtype=torch.float64),
    )


def _problem(sampled: Sampled, chosen: Chosen) -> str | None:
    wrong = tensor_problem("kept_B", chosen.kept_B, sampled.kept_B, boolean=True)
    return wrong or number_problem(chosen.metrics)


ROLLOUTS: Axis[Sampled, RolloutConfig, Chosen] = Axis(
    name="rollout",
    inputs=Sampled,
    result=Chosen,
    rules={"all": _all},
    cases={
        "three completions before their advantages": partial(_made_up, None, 3),
        "three completions with advantages": partial(_made_up, [-1.0, 0.0, 1.0], 3),
        "no completion at all": partial(_made_up, None, 0),
    },
    problem=_problem,
    whole_batch=True,
)
