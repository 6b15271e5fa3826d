"""What a recipe has made of a step, before any gradient.

Legend: B completions of the global batch, N all their tokens back to back.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from learner.algorithm.advantage_inputs import TokenAdvantages
from learner.algorithm.rewarded import StepTokens


@dataclass(frozen=True)
class Prepared:
    """What a completion needs to be trained on; all [B], but for the advantages of tokens."""

    advantages_B: Tensor  # float64, 0 where the completion does not count
    token_weights_B: Tensor  # float64, 0 where the completion does not count
    kept_B: Tensor
    """Which completions count, bool: they have a reward, and the recipe did not leave them out."""
    trained_B: Tensor
    """Which completions have a gradient, bool. Leaving out the others changes nothing."""
    group_B: Tensor
    """Index of each completion's group, long."""
    lengths_B: Tensor
    """Trained tokens of each completion, long."""
    metrics: dict[str, float]
    """Metrics of rules of the user's own."""
    has_advantage_B: Tensor
    """Whether any token of the completion that is in the loss has an advantage, bool."""
    advantages_N: Tensor | None = None
    """Advantages of all tokens of the step, float64, 0 where the completion does not count; None
    where every token has the advantage of its completion."""
    right_B: Tensor | None = None
    """Whether the completion counts and has a reward above 0, bool; None where nobody asks."""
    likelihood_weights_B: Tensor | None = None
    """Weight of each token's log-likelihood, float64; None where the loss has none."""
    returns_N: Tensor | None = None
    """What the critic learns of all tokens of the step, float64; None without a critic."""
    counted_N: Tensor | None = None
    """Which tokens of the step are in the loss at all, bool; None where no rule leaves any out."""

    def likelihood_of(self, chosen: Tensor, device: torch.device) -> Tensor | None:
        """`likelihood_weights_B` of some completions, on `device`."""
        weights_B = self.likelihood_weights_B
        return None if weights_B is None else weights_B[chosen].to(device)

    def of_tokens(self, found: TokenAdvantages, tokens: StepTokens) -> Prepared:
        """This with the advantages of tokens, and without tokens that the rule leaves out."""
        axis, mask_N = tokens.axis, tokens.loss_mask_N
        kept_N = axis.spread(self.kept_B)
        advantages_N = found.advantages_N.double().masked_fill(~kept_N, 0.0)
        lengths_B, trained_B = self.lengths_B, self.trained_B
        if found.counted_N is not None:
            mask_N = mask_N & found.counted_N
            lengths_B = axis.sum(mask_N).long()
            trained_B = trained_B & (lengths_B > 0)
        return replace(
            self,
            advantages_N=advantages_N,
            has_advantage_B=axis.sum((advantages_N != 0) & mask_N) > 0,
            metrics={**self.metrics, **found.metrics},
            returns_N=found.returns_N,
            counted_N=found.counted_N,
            lengths_B=lengths_B,
            trained_B=trained_B,
        )
