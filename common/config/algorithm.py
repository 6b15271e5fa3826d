"""The `algorithm` section of the configuration: the axes that a recipe chooses on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from common.config.bounds import (
    Count,
    Finite,
    Limit,
    NotNegative,
    Positive,
    PositiveShare,
    Share,
    ShareBelowOne,
    at_least,
    at_most,
    or_infinite,
)
from common.config.names import Names

Args = dict[str, Any]
"""Arguments by name."""


@dataclass
class BaselineConfig:
    """How the rewards of a group become the advantages of its completions."""

    kind: Annotated[
        str,
        Names(
            "grpo",
            "dr_grpo",
            "rloo",
            "krpo",
            "raft",
            "reinforce_rej",
            "none",
            "maxrl",
            "disco",
            "quantile",
            "opo",
            "pass_at_k",
            "batch_std",
            "reinforce_pp",
            "reinforce_pp_baseline",
        ),
    ] = "grpo"
    """Rule that turns the rewards of a group into advantages (`learner.algorithm.advantages`)."""
    args: Args = field(default_factory=dict)
    """Keyword arguments of the rule. Those of ours stand in learner/README.md."""
    epsilon: Positive = 1e-6
    """Number added to the standard deviation that `grpo` divides by."""
    min_advantage: Annotated[float, at_most(0)] | None = None
    """Value to which lower advantages are raised; null raises none. GRPO-lambda has -0.1."""


@dataclass
class CreditConfig:
    """How the advantage of a completion becomes the credit of its tokens."""

    kind: Annotated[str, Names("broadcast", "lambda_trace", "prefix_sets")] = "broadcast"
    """Rule that divides credit among the tokens of a completion (`learner.algorithm.credit`)."""
    args: Args = field(default_factory=dict)
    """Keyword arguments of the rule. Those of ours stand in learner/README.md."""
    trace: Literal["recent", "both", "terminal"] = "recent"
    """Shape of `lambda_trace`: credit fades with the distance between tokens (`recent`), also with
    the distance from the start (`both`), or only from the last token back (`terminal`)."""
    application: Literal["trace", "weight"] = "trace"
    """Where `lambda_trace` acts: inside the ratio, before the clip (`trace`), or as a factor of the
    advantage (`weight`)."""
    gamma: Share = 1.0
    """Discount of a token, by which `lambda_trace` multiplies `lambda_`."""
    lambda_: Share = 0.99
    """Decay of a trace from one token to the next. 0 is GRPO."""
    normalize: Literal["none", "mean"] = "none"
    """Whether the loss of a completion is divided by its mean trace weight (`mean`). Without that
    long completions weigh more."""
    cut: bool = False
    """Whether a trace is cut where the policy has moved off the one that sampled (ours)."""
    entropy_quantile: ShareBelowOne = 0.0
    """Quantile of a completion's entropies below which tokens carry no trace. 0 lets all carry it.
    This makes traces selective."""


ClipWidth = Annotated[float, or_infinite(at_least(0))]
"""A distance of the ratio from 1; `.inf` clips nothing on that side."""


@dataclass
class ObjectiveConfig:
    """How ratio and advantage become what is maximised at every token."""

    kind: Annotated[
        str, Names("ppo", "gspo", "gmpo", "cispo", "gpg", "sapo", "dppo", "vespo", "dro")
    ] = "ppo"
    """Objective of a token (`learner.algorithm.objectives`)."""
    args: Args = field(default_factory=dict)
    """Keyword arguments of the rule. Those of ours stand in learner/README.md."""
    clip_low: ClipWidth = 0.2
    """Distance below 1 at which the ratio is clipped; under `gmpo` that of its logarithm from 0.
    `.inf` does not clip."""
    clip_high: ClipWidth = 0.2
    """Distance above 1 at which the ratio is clipped; under `gmpo` that of its logarithm from 0.
    `.inf` does not clip."""
    anchor: Literal["old", "behaviour"] = "old"
    """Policy that ratios are to. `old` is the learner's before the first update of a batch.
    `behaviour` is the one that sampled, so that clips act in asynchronous runs with one update a
    batch; off-policy corrections are off then."""
    updates_per_batch: Count = 1
    """Optimiser steps that share a batch, each on its own part of the prompts. A clip cannot act on
    the first of them. More than there are prompts is as many as there are prompts."""
    epochs: Count = 1
    """Optimiser steps over the same batch. The ratio is to the policy before the first."""
    kl: NotNegative = 0.0
    """Weight (beta) of the KL divergence to the frozen reference policy. 0 is off."""
    kl_in: Literal["loss", "reward"] = "loss"
    """Where the KL divergence counts. `loss` adds its k3 estimate for every token. `reward` takes
    the one-sample estimate for a completion off its reward."""


@dataclass
class CorrectionConfig:
    """How tokens are weighed that another policy sampled than the one that is updated."""

    kind: Annotated[
        str, Names("auto", "none", "tis", "icepop", "sequence_mask", "off_policy_mask", "topr")
    ] = "auto"
    """Off-policy correction (`learner.algorithm.corrections`). `auto` is `tis` where
    `generator.max_staleness` is above 0, else `none`."""
    args: Args = field(default_factory=dict)
    """Keyword arguments of the rule. Those of ours stand in learner/README.md."""
    level: Literal["token", "sequence"] = "token"
    """Whether the ratio to the sampler is that of a token or the product over a completion."""
    cap: Limit = 2.0
    """Largest ratio to the sampler under `tis`, which cuts it there."""


@dataclass
class AggregationConfig:
    """How the losses of tokens are added up."""

    kind: Annotated[str, Names("sequence_mean", "token_mean", "constant", "lambda_grpo")] = (
        "sequence_mean"
    )
    """Weight of a completion's tokens in the loss (`learner.algorithm.aggregation`)."""
    args: Args = field(default_factory=dict)
    """Keyword arguments of the rule. Those of ours stand in learner/README.md."""
    lambda_init: Finite = 0.0
    """Preference for long (above 0) or short answers from which `lambda_grpo` begins."""
    lambda_learning_rate: NotNegative = 0.1
    """Learning rate of the preference for lengths under `lambda_grpo`."""
    length_scale: Positive = 1.0 / 9.0
    """Scale (r) of standardised lengths under `lambda_grpo`."""


@dataclass
class GuidanceConfig:
    """First tokens of `data.solution_column` that lead some completions (G2RPO-A)."""

    ratio: Share = 0.0
    """Share of a group that is guided. 0 is off."""
    schedule: Literal["cycle", "sliding", "fixed", "linear_decay"] = "cycle"
    """How the length of the guidance follows the rewards (`actors.rollout.guidance`)."""
    max_tokens: Count = 3072
    """Longest guidance in tokens, and its length at the start."""
    window: Count = 2
    """Steps of rewards (T) that an update of the length looks back on."""
    mask: bool = True
    """Whether guidance stays out of the loss, since the policy did not sample it."""


@dataclass
class RolloutConfig:
    """Which completions are sampled and kept."""

    kind: Annotated[str, Names("all")] = "all"
    """Rule that chooses among the completions that the keys below leave
    (`learner.algorithm.selection`)."""
    args: Args = field(default_factory=dict)
    """Keyword arguments of the rule. Those of ours stand in learner/README.md."""
    mask_truncated: bool = False
    """Whether completions that were cut at the limit stay out of the loss (DAPO)."""
    overlong_penalty_share: Share = 0.0
    """Share of `generator.max_completion_tokens`, at its end, in which the reward falls by up to 1
    (DAPO's soft punishment). 0 is off."""
    overlong_penalty_factor: NotNegative = 1.0
    """Reward that an answer at the limit loses. DAPO's is 1 for rewards of +1 and -1, so 0.5 for
    rewards of 1 and 0."""
    dynamic_sampling: bool = False
    """Whether new prompts take the place of groups whose rewards are all equal (DAPO)."""
    max_variance_share: PositiveShare = 1.0
    """Share of a group to train on, the completions whose rewards vary most (PODS). 1 takes all."""
    prune_rate: ShareBelowOne = 0.0
    """Share of a group to leave out, the completions of smallest |advantage| (CPPO). 0 is off."""
    refill: bool = False
    """Whether more prompts take the places that pruning frees (CPPO). As many completions are then
    trained on as without pruning; `batch.prompts_per_step` counts the prompts before."""
    guidance: GuidanceConfig = field(default_factory=GuidanceConfig)


@dataclass
class AlgorithmConfig:
    """Six axes. A paper is a choice on each: see deploy/configs/recipes.

    Each `kind` is a name, or a rule of your own as `package.module:name`. A rule of a table takes
    no `args`; the module that is named beside `kind` says what a rule is given and returns.
    """

    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    baseline: BaselineConfig = field(default_factory=BaselineConfig)
    credit: CreditConfig = field(default_factory=CreditConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    correction: CorrectionConfig = field(default_factory=CorrectionConfig)
    aggregation: AggregationConfig = field(default_factory=AggregationConfig)
