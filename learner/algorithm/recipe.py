"""A recipe: one choice on each axis, and the little state that goes with it.

    prepare   rewards of the whole global batch -> advantages, token weights, what to train on
    loss      the loss of one microbatch
    end_step  after the optimiser step: learnable lambda

Every rank prepares the same global batch and so holds the same state without talking.

Legend: B completions of the global batch, all groups.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from common.config.algorithm import AlgorithmConfig, CreditConfig
from common.config.bounds import check_bounds
from common.errors import UserError
from learner.algorithm.advantages import check_rewards, group_advantages
from learner.algorithm.aggregation import build_aggregation
from learner.algorithm.corrections import CORRECTIONS
from learner.algorithm.credit import CREDITS, check_credit
from learner.algorithm.loss import CompletionBatch, LossOutput, policy_loss
from learner.algorithm.objectives import batch_scale
from learner.algorithm.selection import keep_after, keep_before, overlong_penalty


@dataclass(frozen=True)
class Prepared:
    """What a completion needs to be trained on; all [B]."""

    advantages_B: Tensor  # float64, 0 where the completion does not count
    token_weights_B: Tensor  # float64, 0 where the completion does not count
    kept_B: Tensor
    """bool: the completion counts: it has a reward, and the recipe did not leave it out."""
    trained_B: Tensor
    """bool: the completion has a gradient. Leaving out the others changes nothing."""


@dataclass(frozen=True)
class _Batch:
    """The last prepared batch, as `end_step` needs it."""

    kept_B: Tensor
    lengths_V: Tensor
    group_V: Tensor
    scale: float


class Recipe:
    """Composes the axes of `config`. Raises `UserError` naming the key of an impossible value."""

    def __init__(
        self, config: AlgorithmConfig, correction_kind: str, max_completion_tokens: int
    ) -> None:
        check_recipe(config, correction_kind, max_completion_tokens)
        self._config = config
        self._max_completion_tokens = max_completion_tokens
        self._correction_kind = correction_kind
        self._aggregation = build_aggregation(config.aggregation, max_completion_tokens)
        self._batch: _Batch | None = None

    @property
    def needs_prefix_counts(self) -> bool:
        return self._own_credit or self._config.credit.kind == "prefix_sets"

    @property
    def needs_entropy(self) -> bool:
        credit = self._config.credit
        traced = credit.kind == "lambda_trace" and credit.entropy_quantile > 0
        return self._own_credit or traced

    @property
    def _own_credit(self) -> bool:
        """A rule of the user's, which is given all that there is."""
        return self._config.credit.kind not in CREDITS

    @property
    def needs_reference(self) -> bool:
        return self._config.objective.kl > 0

    @property
    def kl(self) -> float:
        """beta of the KL term."""
        return self._config.objective.kl

    @property
    def kl_in_loss(self) -> bool:
        return self.needs_reference and self._config.objective.kl_in == "loss"

    @property
    def kl_in_reward(self) -> bool:
        return self.needs_reference and self._config.objective.kl_in == "reward"

    @property
    def shapes_credit(self) -> bool:
        """Tokens of a completion differ in their weight."""
        return self._config.credit.kind != "broadcast"

    def broadcast(self) -> Recipe:
        """This recipe with GRPO's credit, sharing nothing: for `loss` alone."""
        config = replace(self._config, credit=CreditConfig(kind="broadcast"))
        return Recipe(config, self._correction_kind, self._max_completion_tokens)

    def prepare(
        self,
        rewards_B: Tensor,
        group_B: Tensor,
        lengths_B: Tensor,
        verifier_name: str,
        whole_lengths_B: Tensor | None = None,
        truncated_B: Tensor | None = None,
    ) -> Prepared:
        """Advantages and token weights from the whole global batch.

        `rewards_B` float64, NaN where a completion has no reward: it is left out of its group's
        baseline and of every denominator. `group_B` long, the index of each completion's group.
        `lengths_B` long, trained tokens of each completion. Raises `VerifierError` for an infinite
        reward. `whole_lengths_B` long (all tokens of each completion, `lengths_B` if None) and
        `truncated_B` bool (cut at the limit, none if None) serve the rollout axis. With several
        epochs over a batch, prepare again before each, so that the weights
        follow the learnable lambda.
        """
        check_rewards(rewards_B.masked_fill(rewards_B.isnan(), 0.0), verifier_name)
        rollout = self._config.rollout
        whole_B = lengths_B if whole_lengths_B is None else whole_lengths_B
        rewards_B = rewards_B + overlong_penalty(
            whole_B, self._max_completion_tokens, rollout.overlong_penalty_tokens
        )
        chosen_B = keep_before(rewards_B, group_B, rollout)
        advantages_B, kept_B = group_advantages(
            rewards_B.masked_fill(~chosen_B, math.nan), group_B, self._config.baseline
        )
        cut_B = torch.zeros_like(kept_B) if truncated_B is None else truncated_B
        kept_B = keep_after(advantages_B, group_B, kept_B, cut_B, rollout)
        advantages_B = advantages_B.masked_fill(~kept_B, 0.0)
        lengths_V, group_V = lengths_B[kept_B], group_B[kept_B]
        scale = batch_scale(self._config.objective.kind, advantages_B[kept_B])
        self._batch = _Batch(kept_B, lengths_V, group_V, scale)
        token_weights_B = torch.zeros_like(advantages_B)
        token_weights_B[kept_B] = scale * self._aggregation.weights(lengths_V, group_V)
        useful_B = torch.ones_like(kept_B) if self.kl_in_loss else advantages_B != 0
        trained_B = kept_B & useful_B & (lengths_B > 0)
        return Prepared(advantages_B, token_weights_B, kept_B, trained_B)

    def loss(self, batch: CompletionBatch) -> LossOutput:
        """Loss of one microbatch; see `learner.algorithm.loss.policy_loss`."""
        return policy_loss(batch, self._config, self._correction_kind)

    def end_step(self, surrogate_sums_B: Tensor) -> dict[str, float]:
        """Let the aggregation learn from sum_t l_{i,t}, and return its metrics.

        `surrogate_sums_B` is aligned with the completions given to `prepare`, 0 for those not
        trained on, and already summed over ranks.
        """
        if self._batch is None:
            raise RuntimeError("end_step before prepare")
        batch = self._batch
        sums_V = batch.scale * surrogate_sums_B[batch.kept_B]
        return self._aggregation.end_step(batch.lengths_V, batch.group_V, sums_V)

    def state_dict(self) -> dict[str, Any]:
        return {"aggregation": self._aggregation.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._aggregation.load_state_dict(state["aggregation"])


def check_recipe(config: AlgorithmConfig, correction_kind: str, max_completion_tokens: int) -> None:
    """Raise `UserError` for a value out of its bound, or values that contradict each other."""
    check_bounds(config, "algorithm.")
    credit, correction, window = (
        config.credit,
        config.correction,
        config.rollout.overlong_penalty_tokens,
    )
    if correction.floor > correction.cap:
        raise UserError(
            f"algorithm.correction.floor={correction.floor} must be at most "
            f"algorithm.correction.cap={correction.cap}"
        )
    if window > max_completion_tokens:
        raise UserError(
            f"algorithm.rollout.overlong_penalty_tokens={window} must be at most "
            f"generator.max_completion_tokens={max_completion_tokens}"
        )
    traced = credit.kind == "lambda_trace" and credit.application == "trace"
    if traced and credit.cut and correction_kind != "none":
        raise UserError(
            "algorithm.credit.cut=true needs algorithm.credit.application=weight under a "
            "correction: see learner/algorithm/traces.py"
        )
    check_credit(credit)
    if correction_kind not in CORRECTIONS:
        raise ValueError(f"correction {correction_kind!r} is not one of {sorted(CORRECTIONS)}")
