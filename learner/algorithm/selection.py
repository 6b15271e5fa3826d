"""The learner's share of the rollout axis: rewards by length, and which completions are kept.

    overlong_penalty   DAPO's soft punishment near the length limit
    keep_before        PODS: chosen by reward, before advantages are computed
    keep_after         CPPO: chosen by advantage, after; and DAPO's mask of truncated completions

Legend: B completions of the global batch, G completions of one group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from common.config.algorithm import RolloutConfig
from learner.algorithm.advantages import max_variance_subset, prune_by_advantage


def overlong_penalty(lengths_B: Tensor, limit: int, window: int) -> Tensor:
    """0 up to limit - window tokens, then linear down to -1 at the limit; float64 [B].

    DAPO, arXiv 2503.14476, section 3.4 [P]. `window` 0 gives zeros. `lengths_B` are whole
    completions in tokens.
    """
    if window == 0:
        return torch.zeros(lengths_B.shape, dtype=torch.float64)
    return ((limit - window - lengths_B.double()) / window).clamp(-1.0, 0.0)


def keep_before(rewards_B: Tensor, group_B: Tensor, config: RolloutConfig) -> Tensor:
    """PODS, per group, [B] bool; completions without a reward (NaN) are never kept."""
    scored_B = ~rewards_B.isnan()
    if config.keep_max_variance == 0:
        return scored_B
    kept_B = torch.zeros_like(scored_B)
    for members in _groups(group_B, scored_B):
        keep = min(config.keep_max_variance, len(members))
        kept_B[members] = max_variance_subset(rewards_B[members], keep)
    return kept_B


def keep_after(
    advantages_B: Tensor,
    group_B: Tensor,
    kept_B: Tensor,
    truncated_B: Tensor,
    config: RolloutConfig,
) -> Tensor:
    """CPPO, per group, and the mask of truncated completions; [B] bool within `kept_B`."""
    chosen_B = kept_B.clone()
    if config.prune_rate > 0:
        chosen_B = torch.zeros_like(kept_B)
        for members in _groups(group_B, kept_B):
            chosen_B[members] = prune_by_advantage(advantages_B[members], config.prune_rate)
    if config.mask_truncated:
        chosen_B &= ~truncated_B
    return chosen_B


def _groups(group_B: Tensor, member_B: Tensor) -> list[Tensor]:
    """Indices of each group's members among `member_B`; groups without any are left out."""
    found = [(member_B & (group_B == group)).nonzero()[:, 0] for group in group_B.unique()]
    return [members for members in found if len(members)]
