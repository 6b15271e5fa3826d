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
    PositiveShare,
    Share,
    ShareBelowOne,
    at_least,
    at_most,
    or_infinite,
)
from common.config.contexts import ContextName
from common.config.follow_up import FollowUpConfig
from common.config.names import Names
from common.config.scaffold import ScaffoldConfig

Args = dict[str, Any]
"""Arguments by name."""

ANSWER = r"(?s)<answer>(.*?)</answer>|\\boxed\{([^{}]*)\}|(-?\d+(?:[.,]\d+)*)"
"""Where a completion has its answer, unless the user says otherwise."""


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
            "gdpo",
            "reinforce_pp",
            "reinforce_pp_baseline",
            "remax",
        ),
    ] = "grpo"
    """Rule that turns the rewards of a group into advantages (`learner.algorithm.advantages`)."""
    args: Args = field(default_factory=dict)
    """Keyword arguments of the rule. Those of ours stand in learner/README.md."""
    epsilon: Positive = 1e-6
    """Number added to the standard deviation that `grpo` divides by."""
    min_advantage: Annotated[float, at_most(0)] | None = None
    """Value to which lower advantages are raised; null raises none. GRPO-lambda has -0.1."""


ALONE = ("krpo", "raft", "none", "reinforce_pp")
"""Baselines under which a completion without others in its group may have an advantage."""


ClipWidth = Annotated[float, or_infinite(at_least(0))]
"""A distance on one side, of a ratio from 1 or a value from the old; `.inf` clips nothing there."""


@dataclass
class CriticConfig:
    """The critic of `algorithm.advantage.kind=gae`: a model with a value head, trained beside."""

    lambda_: Share = 1.0
    """Decay of the returns that the critic learns. It is apart from `args.lambda_`, the policy's.
    1 is the reward itself."""
    pretrain_steps: Natural = 0
    """First steps of a run, in which the critic learns alone and the policy stays as it is."""
    learning_rate: Positive | None = None
    """Learning rate of the critic, after as many warm-up steps as the policy has. Null is
    `learner.learning_rate`, without its schedule."""
    value_clip: ClipWidth = 0.2
    """Distance from the value before the step behind which the loss of a value is clipped. `.inf`
    clips nothing."""


@dataclass
class AdvantageConfig:
    """How the advantage of a completion becomes that of its tokens, before credit."""

    kind: Annotated[
        str,
        Names(
            "completion",
            "turn_return",
            "turn_anchor",
            "turn_outcome",
            "prefix_values",
            "key_tokens",
            "distill",
            "flow",
            "gae",
            "evidence",
            "reference_progress",
            "branch_values",
            "tree_values",
        ),
    ] = "completion"
    """Rule that gives every token its advantage (`learner.algorithm.token_advantages`).
    `completion` gives all tokens that of their completion; the others tell turns or tokens
    apart."""
    args: Args = field(default_factory=dict)
    """Keyword arguments of the rule. Those of ours stand in learner/README.md."""
    critic: CriticConfig = field(default_factory=CriticConfig)
    scorer: Literal["reference", "teacher", "ema", "policy"] | None = None
    """Model that scores every token of a step, in a forward pass of its own. `reference` is the
    model that the run began from, `teacher` that of `teacher.path`, `ema` a moving average of the
    policy, `policy` the policy itself. Null scores nothing. Rules that go by scores need one."""
    ema_rate: PositiveShare = 0.05
    """Share of the policy in the moving average: after a step it is (1 - rate) of itself and rate
    of the policy. Of adapters each matrix is averaged by itself."""
    ema_sync_steps: Count = 1
    """Steps between two changes of the moving average."""
    against: Literal["sampler", "policy"] = "sampler"
    """What scores are compared with. `sampler` takes the log-probabilities that tokens were sampled
    with, which are at hand. `policy` scores them by the policy under their own prompt, as the
    scorer does: a forward pass more, and no gap between engine and learner."""
    context: ContextName = "prompt"
    """What the scorer reads before a completion. `prompt` is the completion's own. The others add
    to it: `answer` the right answer, `solution` that of `data.solution_column` (the answer where
    there is no such column), `sibling` a right completion of the group, `feedback` what the
    environment said. A completion for which there is none is not trained on."""
    context_template: str | None = None
    """Text of the context, with `{prompt}` and the name of the context in braces, as `{answer}`.
    Null takes one of `common.config.contexts`."""
    sibling_reward: Finite = 1.0
    """Least reward of a completion that is shown to others of its group as a right one."""


QUIET = ("completion", "prefix_values", "key_tokens", "evidence", "tree_values")
"""Rules of the advantage axis that give groups of equal rewards no signal."""


SCORED = ("distill", "flow", "evidence", "reference_progress")
"""Rules of the advantage axis that go by the log-probabilities of a scorer."""


@dataclass
class CreditConfig:
    """How the advantage of a completion becomes the credit of its tokens."""

    kind: Annotated[
        str,
        Names(
            "broadcast",
            "lambda_trace",
            "prefix_sets",
            "top_entropy",
            "probability",
            "probability_sigmoid",
        ),
    ] = "broadcast"
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
    turn_decay: Share | None = None
    """Decay of a trace from the last token of a turn to the first of the next; null is that from
    any token to the next. 0 ends traces with their turn."""
    normalize: Literal["none", "mean"] = "none"
    """Whether the loss of a completion is divided by its mean trace weight (`mean`). Without that
    long completions weigh more; under `terminal` short ones do."""
    cut: bool = False
    """Whether a token loses credit where the policy has moved off the one that sampled what is
    behind it (ours)."""
    entropy_quantile: ShareBelowOne = 0.0
    """Quantile of a completion's entropies below which its tokens carry no trace. 0 lets all carry
    it."""


@dataclass
class ObjectiveConfig:
    """How ratio and advantage become what is maximised at every token."""

    kind: Annotated[
        str,
        Names(
            "ppo",
            "gspo",
            "gmpo",
            "cispo",
            "gpg",
            "sapo",
            "dppo",
            "vespo",
            "dro",
            "clip_cov",
            "kl_cov",
            "disco",
            "guide",
            "rgr",
        ),
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
    isolate_below: PositiveShare | None = None
    """Probability before the first update below which tokens have updates of their own, ahead of
    those of the other tokens (Lopti). Null trains all tokens at once."""
    epochs: Count = 1
    """Optimiser steps over the same batch. The ratio is to the policy before the first."""
    kl: NotNegative = 0.0
    """Weight (beta) of the KL divergence to the frozen reference policy. 0 is off."""
    kl_in: Literal["loss", "reward"] = "loss"
    """Where the KL divergence counts. `loss` adds its estimate for every token. `reward` takes the
    one-sample estimate for a completion off its reward."""
    kl_estimator: Literal["k1", "k2", "k3", "straight_through", "unbiased"] = "k3"
    """Estimate of the KL divergence in the loss (`learner.algorithm.kl`). `k3` is GRPO's."""
    likelihood: NotNegative = 0.0
    """Weight of the mean log-likelihood of the tokens of right answers, those of a reward above 0
    (VAPO). 0 is off."""
    entropy: NotNegative = 0.0
    """Weight of the bonus for entropy, with the weights of tokens that the aggregation gives. 0 is
    off, and costs nothing."""


@dataclass
class CorrectionConfig:
    """How tokens are weighed that another policy sampled than the one that is updated."""

    kind: Annotated[
        str,
        Names("auto", "none", "tis", "icepop", "sequence_mask", "off_policy_mask", "topr", "m2po"),
    ] = "auto"
    """Off-policy correction (`learner.algorithm.corrections`). `auto` is `tis` where
    `generator.max_staleness` is above 0 or `generator.quantization` is set, else `none`."""
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
class ConsistencyConfig:
    """A bonus for right answers that follow from what was said before them (GRPO-CARE)."""

    weight: NotNegative = 0.0
    """Share of its accuracy that such an answer earns besides. 0 is off. GRPO-CARE has 0.5."""
    cap: PositiveShare = 0.95
    """Probability of an answer under the scorer above which it counts as this one."""
    margin: NotNegative = 0.01
    """How far below the mean of the group's right answers that probability may be."""
    accuracy: NotNegative = 0.1
    """Accuracy above which an answer is right; it must be that of its group's mean besides."""
    pattern: str = ANSWER
    """Regular expression of the answer in a completion. The last match counts, of it the first
    group that took part. By default between tags of an answer, in a box, or the last number."""


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
    """Share of `generator.max_completion_tokens`, at its end, in which the reward falls by up to
    `overlong_penalty_factor` (DAPO's soft punishment). 0 is off."""
    overlong_penalty_factor: NotNegative = 0.5
    """Reward that an answer at the limit loses. DAPO's is 1 for rewards of +1 and -1, which is 0.5
    for rewards of 1 and 0."""
    greedy: bool = False
    """Whether the first completion of a group is sampled at temperature 0. The others are compared
    with it, and it is not trained on (ReMax)."""
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
    follow_up: FollowUpConfig = field(default_factory=FollowUpConfig)
    scaffold: ScaffoldConfig = field(default_factory=ScaffoldConfig)
    consistency: ConsistencyConfig = field(default_factory=ConsistencyConfig)


@dataclass
class AlgorithmConfig:
    """Seven axes. A paper is a choice on each: see deploy/configs/recipes.

    Each `kind` is a name, or a rule of your own as `package.module:name`. The `args` of rules that
    are here stand in learner/README.md; the module that is named beside `kind` says what a rule is
    given and returns.
    """

    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    baseline: BaselineConfig = field(default_factory=BaselineConfig)
    advantage: AdvantageConfig = field(default_factory=AdvantageConfig)
    credit: CreditConfig = field(default_factory=CreditConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    correction: CorrectionConfig = field(default_factory=CorrectionConfig)
    aggregation: AggregationConfig = field(default_factory=AggregationConfig)

    @property
    def needs_reference(self) -> bool:
        """Whether the learner also holds the model that the run began from."""
        return self.objective.kl > 0 or self.advantage.scorer == "reference"

    @property
    def needs_critic(self) -> bool:
        """Whether the learner trains a critic beside the policy."""
        return self.advantage.kind == "gae"

    @property
    def needs_average(self) -> bool:
        """Whether the learner also holds a moving average of the policy."""
        return self.advantage.scorer == "ema"
