"""The `algorithm` section of the configuration: the axes that a recipe chooses on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from common.config.bounds import (
    Count,
    Finite,
    Limit,
    Natural,
    NotNegative,
    Positive,
    Share,
    ShareBelowOne,
    at_least,
    at_most,
    or_infinite,
)
from common.config.rules import RuleNames

Args = dict[str, Any]
"""Arguments by name; the rules of our own take none."""


@dataclass
class BaselineConfig:
    """R -> advantage of a completion."""

    kind: Annotated[
        str, RuleNames("grpo", "dr_grpo", "rloo", "krpo", "raft", "reinforce_rej", "none")
    ] = "grpo"
    """A name of the table in `learner.algorithm.advantages`, or your own as
    `package.module:name`."""
    args: Args = field(default_factory=dict)
    """Keyword arguments of a rule of your own."""
    epsilon: Positive = 1e-6
    min_advantage: Annotated[float, at_most(0)] | None = None
    """Advantages are clamped from below (GRPO-lambda: -0.1)."""


@dataclass
class CreditConfig:
    """Advantage of a completion -> weight of every token."""

    kind: Annotated[str, RuleNames("broadcast", "lambda_trace", "prefix_sets")] = "broadcast"
    """A name of the table in `learner.algorithm.credit`, or your own as
    `package.module:name`."""
    args: Args = field(default_factory=dict)
    """Keyword arguments of a rule of your own."""
    trace: Literal["recent", "both", "terminal"] = "recent"
    application: Literal["trace", "weight"] = "trace"
    """`trace`: inside the ratio, before the clip; `weight`: on the advantage."""
    gamma: Share = 1.0
    lambda_: Share = 0.99
    normalize: Literal["none", "mean"] = "none"
    cut: bool = False
    """Cut the trace where the policy has moved off the behaviour policy (ours)."""
    entropy_quantile: ShareBelowOne = 0.0
    """Selective traces: tokens below this entropy quantile carry no trace. 0 is off."""


ClipWidth = Annotated[float, or_infinite(at_least(0))]
"""`.inf` clips nothing on that side."""


@dataclass
class ObjectiveConfig:
    """Log-ratio and advantage -> surrogate of every token."""

    kind: Annotated[str, RuleNames("ppo", "gspo", "gmpo", "cispo", "gpg")] = "ppo"
    """A name of the table in `learner.algorithm.objectives`, or your own as
    `package.module:name`."""
    args: Args = field(default_factory=dict)
    """Keyword arguments of a rule of your own."""
    clip_low: ClipWidth = 0.2
    clip_high: ClipWidth = 0.2
    epochs: Count = 1
    """Optimiser steps over the same batch; pi_old is the policy before the first."""
    kl: NotNegative = 0.0
    """beta of the k3 estimator to the frozen reference policy."""
    kl_in: Literal["loss", "reward"] = "loss"
    """`reward`: beta times the one-sample estimate of a completion's KL is taken off its reward."""


@dataclass
class CorrectionConfig:
    """Off-policy correction on the behaviour policy, multiplied into the surrogate."""

    kind: Annotated[str, RuleNames("auto", "none", "tis", "icepop")] = "auto"
    """A name of the table in `learner.algorithm.corrections`, or your own as `package.module:name`.
    `auto` is `tis` when `max_staleness` > 0, else `none`."""
    args: Args = field(default_factory=dict)
    """Keyword arguments of a rule of your own."""
    level: Literal["token", "sequence"] = "token"
    cap: Limit = 2.0
    floor: NotNegative = 0.5
    """IcePop: tokens whose ratio lies outside [floor, cap] are zeroed."""


@dataclass
class AggregationConfig:
    """Token surrogates -> a scalar."""

    kind: Annotated[str, RuleNames("sequence_mean", "token_mean", "constant", "lambda_grpo")] = (
        "sequence_mean"
    )
    """A name of the table in `learner.algorithm.aggregation`, or your own as
    `package.module:name`."""
    args: Args = field(default_factory=dict)
    """Keyword arguments of a rule of your own."""
    lambda_init: Finite = 0.0
    lambda_learning_rate: NotNegative = 0.1
    length_scale: Positive = 1.0 / 9.0


@dataclass
class GuidanceConfig:
    """G2RPO-A: the first tokens of `data.solution_column` lead some completions."""

    ratio: Share = 0.0
    """Share of a group that is guided. 0 is off."""
    schedule: Literal["cycle", "sliding", "fixed", "linear_decay"] = "cycle"
    max_tokens: Count = 3072
    """l_0 and l_max."""
    window: Count = 2
    """T: steps of reward history an update looks back on."""
    mask: bool = True
    """Guidance tokens stay out of the loss: the policy did not sample them."""


@dataclass
class RolloutConfig:
    """Which completions are sampled and kept."""

    kind: Annotated[str, RuleNames("all")] = "all"
    """Chooses among the completions that the keys below leave: `all` of them, or your own as
    `package.module:name` (`learner.algorithm.selection`)."""
    args: Args = field(default_factory=dict)
    """Keyword arguments of a rule of your own."""
    mask_truncated: bool = False
    """Completions cut at the limit stay out of the loss (DAPO)."""
    overlong_penalty_tokens: Natural = 0
    """DAPO's soft punishment: reward falls by up to 1 over the last N tokens. 0 is off."""
    dynamic_sampling: bool = False
    """Groups whose rewards are all equal are filtered and replaced by new prompts (DAPO)."""
    keep_max_variance: Natural = 0
    """PODS: train on this many completions of a group, those of most reward variance. 0 is off."""
    prune_rate: ShareBelowOne = 0.0
    """CPPO: the share of a group left out, those of least |advantage|. 0 is off."""
    refill: bool = False
    """CPPO: the places that pruning frees are filled with more prompts, so that as many
    completions are trained on as without it; `batch.prompts_per_step` counts them before."""
    guidance: GuidanceConfig = field(default_factory=GuidanceConfig)


@dataclass
class AlgorithmConfig:
    """Six axes. A paper is a choice on each: see deploy/configs/recipes."""

    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    baseline: BaselineConfig = field(default_factory=BaselineConfig)
    credit: CreditConfig = field(default_factory=CreditConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    correction: CorrectionConfig = field(default_factory=CorrectionConfig)
    aggregation: AggregationConfig = field(default_factory=AggregationConfig)
