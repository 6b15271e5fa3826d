"""A recipe: one choice on each axis, and the little state that goes with it.

    estimate  rewards of the whole global batch -> advantages, and what to train on
    weigh     the completions of one update -> token weights, with a denominator of their own
    loss      the loss of one microbatch
    end_step  after the optimiser step: learnable lambda

Every rank prepares the same global batch and so holds the same state without talking.

Legend: B completions of the global batch, all groups.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from common.config.algorithm import (
    AdvantageConfig,
    AlgorithmConfig,
    ConsistencyConfig,
    CorrectionConfig,
    CreditConfig,
    CriticConfig,
)
from common.errors import UserError
from learner.algorithm.advantage_inputs import AdvantageInputs
from learner.algorithm.advantages import BASELINES, check_rewards, group_advantages
from learner.algorithm.aggregation import AGGREGATIONS, KeptCompletions, LearnedAggregation
from learner.algorithm.axis import Rule
from learner.algorithm.choices import TokenColumns, TokenShare, token_shares
from learner.algorithm.corrections import CORRECTIONS
from learner.algorithm.credit import CREDITS
from learner.algorithm.grouped import RewardPart
from learner.algorithm.loss import CompletionBatch, LossOutput, policy_loss
from learner.algorithm.objectives import OBJECTIVES, batch_scale
from learner.algorithm.prepared import Prepared
from learner.algorithm.recipe_checks import check_recipe
from learner.algorithm.rewarded import Rewarded
from learner.algorithm.selection import ROLLOUTS, Chosen, Sampled, by_keys, overlong_penalty
from learner.algorithm.token_advantages import ADVANTAGES


@dataclass(frozen=True)
class _Batch:
    """The last prepared batch, as `end_step` needs it."""

    kept_B: Tensor
    kept: KeptCompletions
    scale: float


class Recipe:
    """Composes the axes of `config`. Raises `UserError` naming the key of an impossible value."""

    def __init__(
        self, config: AlgorithmConfig, correction_kind: str, max_completion_tokens: int
    ) -> None:
        check_recipe(config, correction_kind)
        self._config = config
        self._max_completion_tokens = max_completion_tokens
        self._correction_kind = correction_kind
        self._rollout = ROLLOUTS.rule(config.rollout)
        self._baseline = BASELINES.rule(config.baseline)
        self._advantage = ADVANTAGES.rule(config.advantage)
        self._aggregation = AGGREGATIONS.rule(config.aggregation)
        self._batch: _Batch | None = None

    @property
    def needs_prefix_counts(self) -> bool:
        """Whether the credit rule is given sizes of prefix sets, as a rule of the user's own is."""
        kind = self._config.credit.kind
        return kind == "prefix_sets" or CREDITS.is_own(kind)

    @property
    def entropy_bonus(self) -> bool:
        """Whether the loss has a bonus for entropy, which needs its gradient."""
        return self._config.objective.entropy > 0

    @property
    def needs_entropy(self) -> bool:
        """Whether the loss or the credit rule is given entropies, as a rule of one's own is."""
        credit = self._config.credit
        traced = credit.kind == "lambda_trace" and credit.entropy_quantile > 0
        return traced or self.entropy_bonus or CREDITS.is_own(credit.kind)

    def choosers(self) -> dict[str, Callable[[TokenColumns], Tensor]]:
        """By axis, how its rule chooses among all tokens of an update; mostly none does."""
        found = {
            "credit": CREDITS.chooser(self._config.credit),
            "objective": OBJECTIVES.chooser(self._config.objective),
            "correction": CORRECTIONS.chooser(self._correction),
        }
        return {axis: chooser for axis, chooser in found.items() if chooser is not None}

    def token_shares(self) -> list[TokenShare | None]:
        """Which tokens the updates of a batch are for, in their order; None: all of them."""
        return token_shares(self._config.objective)

    @property
    def _correction(self) -> CorrectionConfig:
        return replace(self._config.correction, kind=self._correction_kind)

    @property
    def needs_reference(self) -> bool:
        return self._config.needs_reference

    @property
    def scorer(self) -> str | None:
        """Who scores the tokens of a step (`algorithm.advantage.scorer`); mostly nobody."""
        return self._config.advantage.scorer

    @property
    def critic(self) -> CriticConfig | None:
        """How the critic learns; None where the recipe has none."""
        return self._config.advantage.critic if self._config.needs_critic else None

    @property
    def held_steps(self) -> int:
        """First steps of a run, in which the critic learns and the policy does not move."""
        return 0 if self.critic is None else self.critic.pretrain_steps

    @property
    def advantage(self) -> AdvantageConfig:
        """Who scores the tokens, and what the scorer reads."""
        return self._config.advantage

    @property
    def consistency(self) -> ConsistencyConfig:
        """The bonus for answers that follow from what was said before them."""
        return self._config.rollout.consistency

    @property
    def kl(self) -> float:
        """The factor beta of the KL term."""
        return self._config.objective.kl

    @property
    def kl_in_loss(self) -> bool:
        return self.kl > 0 and self._config.objective.kl_in == "loss"

    @property
    def kl_in_reward(self) -> bool:
        return self.kl > 0 and self._config.objective.kl_in == "reward"

    @property
    def shapes_credit(self) -> bool:
        """Whether tokens of a completion may differ in their weight."""
        return self._config.credit.kind != "broadcast"

    def broadcast(self) -> Recipe:
        """This recipe with GRPO's credit: for `loss` alone, since it shares what rules remember."""
        same = copy.copy(self)
        same._config = replace(self._config, credit=CreditConfig(kind="broadcast"))
        return same

    def prepare(self, rewarded: Rewarded) -> Prepared:
        """`estimate`, and `weigh` of the whole batch as one update: see there."""
        return self.weigh(self.estimate(rewarded))

    def estimate(self, rewarded: Rewarded) -> Prepared:
        """Advantages from the whole global batch; token weights are still 0.

        Raises:
            VerifierError: a reward is infinite.
        """
        group_B, lengths_B = rewarded.group_B, rewarded.lengths_B
        check_rewards(_known(rewarded.rewards_B), rewarded.verifier_name)
        sampled_B, cut_B = rewarded.sampled_lengths_B, rewarded.truncated_B
        sampled_B = lengths_B if sampled_B is None else sampled_B
        cut_B = torch.zeros(len(sampled_B), dtype=torch.bool) if cut_B is None else cut_B
        rollout = self._config.rollout
        penalty_B = rollout.overlong_penalty_factor * overlong_penalty(
            sampled_B, self._max_completion_tokens, rollout.overlong_penalty_share
        )
        rewards_B = rewarded.rewards_B + penalty_B
        parts = [*rewarded.parts, RewardPart(penalty_B, 1.0)] if rewarded.parts else []
        compared_B = self._compared(rewarded)
        if not rollout.greedy:  # of a run that had it
            rewards_B = rewards_B.masked_fill(compared_B, math.nan)
        scored_B = ~rewards_B.isnan()
        before = self._choose(Sampled(rewards_B, group_B, sampled_B, cut_B, scored_B))
        rewards_B = rewards_B.masked_fill(~before.kept_B, math.nan)
        advantages_B, kept_B, metrics = self._compare(
            rewards_B, group_B, sampled_B, parts, rewarded.scores_B, compared_B
        )
        after = self._choose(Sampled(rewards_B, group_B, sampled_B, cut_B, kept_B, advantages_B))
        kept_B = after.kept_B
        if rewarded.scored_B is not None:
            kept_B = kept_B & rewarded.scored_B
        advantages_B = advantages_B.masked_fill(~kept_B, 0.0)
        found = Prepared(
            advantages_B,
            token_weights_B=torch.zeros_like(advantages_B),
            kept_B=kept_B,
            trained_B=kept_B & (lengths_B > 0),
            group_B=group_B,
            lengths_B=lengths_B,
            metrics={**before.metrics, **metrics, **after.metrics},
            has_advantage_B=advantages_B != 0,
        )
        found = self._of_tokens(found, rewards_B, rewarded)
        taught_B = found.has_advantage_B
        if self._config.objective.likelihood > 0:
            found = replace(found, right_B=kept_B & (rewards_B > 0))
            taught_B = taught_B | (rewards_B > 0)
        if (
            self.kl_in_loss
            or self.entropy_bonus
            or OBJECTIVES.chooses_of_all(self._config.objective)
        ):
            return found
        return replace(found, trained_B=found.trained_B & taught_B)

    def _compare(
        self,
        values_B: Tensor,
        group_B: Tensor,
        lengths_B: Tensor,
        parts: Sequence[RewardPart] = (),
        scores_B: Tensor | None = None,
        compared_B: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Mapping[str, float]]:
        config = self._config.baseline
        return group_advantages(
            values_B, group_B, lengths_B, config, self._baseline, parts, scores_B, compared_B
        )

    def _compared(self, rewarded: Rewarded) -> Tensor:
        """Completions that others are compared with, [B] bool.

        Raises:
            UserError: the recipe needs some, and none was sampled.
        """
        compared_B = rewarded.compared_B
        if compared_B is None:
            compared_B = torch.zeros(len(rewarded.rewards_B), dtype=torch.bool)
        if self._config.rollout.greedy and len(compared_B) and not compared_B.any():
            raise UserError(
                "algorithm.rollout.greedy=true compares with greedy completions, and the run that "
                "sampled these had none: set it to false with another baseline, or sample anew"
            )
        return compared_B

    def _of_tokens(self, found: Prepared, rewards_B: Tensor, rewarded: Rewarded) -> Prepared:
        """`found` with advantages of tokens, where the rule tells tokens apart."""
        config, tokens, step = self._config.advantage, rewarded.tokens, rewarded.step
        if config.kind == "completion":
            return found
        if tokens is None:
            raise ValueError(f"algorithm.advantage.kind={config.kind} needs the tokens of the step")

        def baseline(values: Tensor, groups: Tensor, lengths: Tensor) -> Tensor:
            return self._compare(values, groups, lengths)[0]

        inputs = AdvantageInputs(
            found.advantages_B, rewards_B, found.group_B, found.kept_B, tokens, baseline, step
        )
        answer = ADVANTAGES.call(self._advantage, config.kind, inputs)
        return found.of_tokens(answer, tokens)

    def _choose(self, sampled: Sampled) -> Chosen:
        """Leave out what the keys of the rollout axis say, and then what its rule says."""
        config = self._config.rollout
        sampled = replace(sampled, kept_B=by_keys(sampled, config))
        chosen = ROLLOUTS.call(self._rollout, config.kind, sampled)
        return replace(chosen, kept_B=chosen.kept_B & sampled.kept_B)

    def weigh(self, estimated: Prepared, part_B: Tensor | None = None) -> Prepared:
        """`estimated` with the token weights of one update, 0 for completions that it leaves out.

        Weigh again before each update of a batch, so that weights follow the learnable lambda.

        Args:
            part_B: bool, the completions of the update; None for all.
        """
        counted_B = estimated.kept_B if part_B is None else estimated.kept_B & part_B
        advantages_V = estimated.advantages_B[counted_B]
        kept = KeptCompletions(
            estimated.lengths_B[counted_B],
            estimated.group_B[counted_B],
            advantages_V,
            self._max_completion_tokens,
        )
        scale = batch_scale(self._config.objective.kind, advantages_V, kept.group_V)
        self._batch = _Batch(counted_B, kept, scale)
        found = AGGREGATIONS.call(self._aggregation, self._config.aggregation.kind, kept)
        token_weights_B = torch.zeros_like(estimated.advantages_B)
        token_weights_B[counted_B] = scale * found.weights_V.double()
        metrics = {**estimated.metrics, **found.metrics}
        return replace(
            estimated,
            token_weights_B=token_weights_B,
            likelihood_weights_B=self._likelihood(estimated, counted_B),
            metrics=metrics,
        )

    def _likelihood(self, estimated: Prepared, counted_B: Tensor) -> Tensor | None:
        """Weights that make a mean over the tokens of right answers among those of an update."""
        if estimated.right_B is None:
            return None
        right_B = (estimated.right_B & counted_B).double()
        tokens = float((right_B * estimated.lengths_B).sum())
        return self._config.objective.likelihood * right_B / max(tokens, 1.0)

    def loss(self, batch: CompletionBatch) -> LossOutput:
        """Loss of one microbatch; see `learner.algorithm.loss.policy_loss`."""
        return policy_loss(batch, self._config, self._correction_kind)

    def end_step(self, surrogate_sums_B: Tensor) -> Mapping[str, float]:
        """Let the aggregation learn from sum_t l_{i,t}, and return its metrics.

        `surrogate_sums_B` is aligned with the completions given to `prepare`, 0 for those not
        trained on, and already summed over ranks.
        """
        if self._batch is None:
            raise RuntimeError("end_step before prepare")
        if not isinstance(self._aggregation, LearnedAggregation):
            return {}
        batch = self._batch
        sums_V = batch.scale * surrogate_sums_B[batch.kept_B]
        return self._aggregation.end_step(batch.kept, sums_V)

    def state_dict(self) -> dict[str, Any]:
        """What the rules remember, as JSON, with the `kind` of each."""
        return {
            name: {"kind": kind, "state": rule.state_dict()}
            for name, (kind, rule) in self._rules().items()
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state`. A rule of another `kind` than before a resume begins anew."""
        for name, (kind, rule) in self._rules().items():
            saved = state.get(name, {})
            if saved.get("kind") == kind:
                rule.load_state_dict(saved["state"])

    def _rules(self) -> dict[str, tuple[str, Rule[Any, Any]]]:
        """Kind and rule of each axis that may remember something."""
        config = self._config
        return {
            "rollout": (config.rollout.kind, self._rollout),
            "baseline": (config.baseline.kind, self._baseline),
            "advantage": (config.advantage.kind, self._advantage),
            "aggregation": (config.aggregation.kind, self._aggregation),
        }


def _known(rewards_B: Tensor) -> Tensor:
    return rewards_B.masked_fill(rewards_B.isnan(), 0.0)
