"""A recipe: one choice on each axis, and the little state that goes with it.

    estimate  rewards of the whole global batch -> advantages, and what to train on
    weigh     the completions of one update -> token weights, with a denominator of their own
    loss      the loss of one microbatch
    end_step  after the optimiser step: learnable lambda

Every rank prepares the same global batch and so holds the same state without talking.

Legend: B completions of the global batch, all groups.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from common.config.algorithm import AlgorithmConfig, CreditConfig
from common.config.bounds import check_bounds
from common.errors import UserError
from learner.algorithm.advantages import BASELINES, check_rewards, group_advantages
from learner.algorithm.aggregation import AGGREGATIONS, KeptCompletions, LearnedAggregation
from learner.algorithm.axis import Rule
from learner.algorithm.corrections import CORRECTIONS
from learner.algorithm.credit import CREDITS
from learner.algorithm.loss import CompletionBatch, LossOutput, policy_loss
from learner.algorithm.objectives import OBJECTIVES, batch_scale
from learner.algorithm.selection import ROLLOUTS, Chosen, Sampled, by_keys, overlong_penalty


@dataclass(frozen=True)
class Prepared:
    """What a completion needs to be trained on; all [B]."""

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
        self._aggregation = AGGREGATIONS.rule(config.aggregation)
        self._batch: _Batch | None = None

    @property
    def needs_prefix_counts(self) -> bool:
        """Whether the credit rule is given sizes of prefix sets, as a rule of the user's own is."""
        kind = self._config.credit.kind
        return kind == "prefix_sets" or CREDITS.is_own(kind)

    @property
    def needs_entropy(self) -> bool:
        """Whether the credit rule is given entropies, as a rule of the user's own is."""
        credit = self._config.credit
        traced = credit.kind == "lambda_trace" and credit.entropy_quantile > 0
        return traced or CREDITS.is_own(credit.kind)

    @property
    def needs_reference(self) -> bool:
        return self._config.objective.kl > 0

    @property
    def kl(self) -> float:
        """The factor beta of the KL term."""
        return self._config.objective.kl

    @property
    def kl_in_loss(self) -> bool:
        return self.needs_reference and self._config.objective.kl_in == "loss"

    @property
    def kl_in_reward(self) -> bool:
        return self.needs_reference and self._config.objective.kl_in == "reward"

    @property
    def shapes_credit(self) -> bool:
        """Whether tokens of a completion may differ in their weight."""
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
        """`estimate`, and `weigh` of the whole batch as one update: see there."""
        estimated = self.estimate(
            rewards_B, group_B, lengths_B, verifier_name, whole_lengths_B, truncated_B
        )
        return self.weigh(estimated)

    def estimate(
        self,
        rewards_B: Tensor,
        group_B: Tensor,
        lengths_B: Tensor,
        verifier_name: str,
        whole_lengths_B: Tensor | None = None,
        truncated_B: Tensor | None = None,
    ) -> Prepared:
        """Advantages from the whole global batch; token weights are still 0.

        `rewards_B` float64, NaN where a completion has no reward: it is left out of its group's
        baseline and of every denominator. `group_B` long, the index of each completion's group.
        `lengths_B` long, trained tokens of each completion. Raises `VerifierError` for an infinite
        reward. `whole_lengths_B` long (all tokens of each completion, `lengths_B` if None) and
        `truncated_B` bool (cut at the limit, none if None) serve the rollout axis.
        """
        check_rewards(rewards_B.masked_fill(rewards_B.isnan(), 0.0), verifier_name)
        whole_B = lengths_B if whole_lengths_B is None else whole_lengths_B
        rollout = self._config.rollout
        rewards_B = rewards_B + rollout.overlong_penalty_factor * overlong_penalty(
            whole_B, self._max_completion_tokens, rollout.overlong_penalty_share
        )
        cut_B = torch.zeros(len(whole_B), dtype=torch.bool) if truncated_B is None else truncated_B
        scored_B = ~rewards_B.isnan()
        before = self._choose(Sampled(rewards_B, group_B, whole_B, cut_B, scored_B))
        advantages_B, kept_B, metrics = group_advantages(
            rewards_B.masked_fill(~before.kept_B, math.nan),
            group_B,
            whole_B,
            self._config.baseline,
            self._baseline,
        )
        after = self._choose(Sampled(rewards_B, group_B, whole_B, cut_B, kept_B, advantages_B))
        kept_B = after.kept_B
        advantages_B = advantages_B.masked_fill(~kept_B, 0.0)
        useful_B = torch.ones_like(kept_B) if self.kl_in_loss else advantages_B != 0
        return Prepared(
            advantages_B,
            token_weights_B=torch.zeros_like(advantages_B),
            kept_B=kept_B,
            trained_B=kept_B & useful_B & (lengths_B > 0),
            group_B=group_B,
            lengths_B=lengths_B,
            metrics={**before.metrics, **metrics, **after.metrics},
        )

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
        return replace(estimated, token_weights_B=token_weights_B, metrics=metrics)

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
            "aggregation": (config.aggregation.kind, self._aggregation),
        }


def check_recipe(config: AlgorithmConfig, correction_kind: str) -> None:
    """Raise `UserError` for a value out of its bound, or values that contradict each other."""
    check_bounds(config, "algorithm.")
    credit = config.credit
    if config.objective.anchor == "behaviour":
        _check_anchor(credit, correction_kind)
    traced = credit.kind == "lambda_trace" and credit.application == "trace"
    if traced and credit.cut and correction_kind != "none":
        raise UserError(
            "algorithm.credit.cut=true needs algorithm.credit.application=weight under a "
            "correction: see learner/algorithm/traces.py"
        )
    _try_rules(config, correction_kind)


def _check_anchor(credit: CreditConfig, correction_kind: str) -> None:
    """Refuse what would count the ratio to the sampler twice."""
    if correction_kind != "none":
        raise UserError(
            "algorithm.objective.anchor=behaviour takes ratios to the sampler itself, and "
            f"algorithm.correction.kind={correction_kind} would count them twice: use none or auto"
        )
    if credit.kind == "lambda_trace" and credit.cut:
        raise UserError(
            "algorithm.credit.cut=true cuts traces by the ratio to the sampler, which "
            "algorithm.objective.anchor=behaviour has in every ratio: use one of the two"
        )


def _try_rules(config: AlgorithmConfig, correction_kind: str) -> None:
    """Try the user's own rules. No two of them may record a metric of the same name."""
    correction = replace(config.correction, kind=correction_kind)
    names = {
        ROLLOUTS.key: ROLLOUTS.check(config.rollout),
        BASELINES.key: BASELINES.check(config.baseline),
        CREDITS.key: CREDITS.check(config.credit),
        OBJECTIVES.key: OBJECTIVES.check(config.objective),
        CORRECTIONS.key: CORRECTIONS.check(correction),
        AGGREGATIONS.key: AGGREGATIONS.check(config.aggregation),
    }
    for (key, mine), (other, theirs) in itertools.combinations(names.items(), 2):
        if both := mine & theirs:
            raise UserError(
                f"the rules of {key} and {other} both record {', '.join(sorted(both))}: give the "
                "metric of one another name"
            )
