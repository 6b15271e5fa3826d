"""Seven axes: rules by name and rules of a user's own, tried before anything starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, get_type_hints

import pytest
import torch
from maths_oracles import algorithm, random_batch
from rule_arguments import PAGE, with_table
from torch import Tensor

from common.config.algorithm import (
    AggregationConfig,
    AlgorithmConfig,
    BaselineConfig,
    CorrectionConfig,
    CreditConfig,
    ObjectiveConfig,
    RolloutConfig,
)
from common.config.bounds import bound_of
from common.config.load import load_config
from common.config.names import names_in
from common.errors import RunError, UserError
from learner.algorithm.advantages import BASELINES
from learner.algorithm.aggregation import (
    AGGREGATIONS,
    KeptCompletions,
    LearnedAggregation,
    TokenWeights,
)
from learner.algorithm.arguments import parameters
from learner.algorithm.axis import Axis, Rule
from learner.algorithm.corrections import CORRECTIONS, Correction, CorrectionInputs
from learner.algorithm.credit import CREDITS, Credit, CreditInputs
from learner.algorithm.grouped import Advantages, GroupedRewards
from learner.algorithm.loss import policy_loss
from learner.algorithm.objectives import OBJECTIVES
from learner.algorithm.prepared import Prepared
from learner.algorithm.recipe import Recipe
from learner.algorithm.recipe_checks import check_recipe
from learner.algorithm.rewarded import Rewarded
from learner.algorithm.selection import ROLLOUTS, Chosen, Sampled
from learner.algorithm.surrogates import Surrogate, Terms
from learner.algorithm.token_advantages import ADVANTAGES

AXES: dict[str, Axis[Any, Any, Any]] = {
    axis.name: axis
    for axis in (
        ROLLOUTS,
        BASELINES,
        ADVANTAGES,
        CREDITS,
        OBJECTIVES,
        CORRECTIONS,
        AGGREGATIONS,
    )
}
HERE = f"{__name__}:"


@pytest.mark.parametrize("name", AXES)
def test_the_configuration_knows_the_names_of_the_table(name: str) -> None:
    """`auto` is settled by the configuration itself."""
    section = getattr(AlgorithmConfig(), name)
    names = names_in(get_type_hints(type(section), include_extras=True)["kind"])
    assert set(names) - {"auto"} == AXES[name].rules.keys()
    assert section.kind in names


@pytest.mark.parametrize(("name", "kind"), [(n, k) for n, a in AXES.items() for k in a.rules])
def test_our_own_rules_pass_what_is_asked_of_a_users(name: str, kind: str) -> None:
    axis, config = AXES[name], getattr(AlgorithmConfig(), name)
    config.kind = kind
    for make in axis.cases.values():
        inputs = make()
        if axis.chooser(config) is not None:  # what the step gives such a rule
            chosen_N = torch.ones_like(inputs.behaviour_gap_N, dtype=torch.bool)
            inputs = replace(inputs, chosen_N=chosen_N)
        assert axis.problem(inputs, axis.rule(config)(inputs)) is None


# A rule of a user's own on every axis. Each does what one of ours does, and says so in a metric.


def keep_long(sampled: Sampled, config: RolloutConfig, least: int = 1) -> Chosen:
    kept_B = sampled.lengths_B >= least
    when = "before" if sampled.advantages_B is None else "after"
    return Chosen(kept_B, {f"mine/{when}": float(kept_B.sum())})


def centred(grouped: GroupedRewards, config: BaselineConfig, scale: float = 1.0) -> Advantages:
    return Advantages(scale * grouped.centred_V, metrics={"mine/groups": float(grouped.groups)})


def halves(inputs: CreditInputs, config: CreditConfig) -> Credit:
    half_N = torch.full_like(inputs.log_ratio_N, 0.5)
    return Credit(inputs.log_ratio_N, half_N, half_N, half_N, {"mine/half": half_N})


def unclipped(terms: Terms, config: ObjectiveConfig) -> Surrogate:
    values_N = terms.log_ratio_N.exp() * terms.advantages_N
    metrics = {"mine/advantage": terms.advantages_N}
    return Surrogate(values_N, torch.zeros_like(values_N, dtype=torch.bool), metrics)


def squared(inputs: CorrectionInputs, config: CorrectionConfig) -> Correction:
    return Correction(inputs.ratio_N**2, {"mine/ratio": inputs.ratio_N})


def one_each(kept: KeptCompletions, config: AggregationConfig) -> TokenWeights:
    weights_V = 1 / (kept.lengths_V.double() * len(kept.lengths_V)).clamp(min=1)
    return TokenWeights(weights_V, {"mine/tokens": float(kept.lengths_V.sum())})


REWARDS = torch.tensor([1.0, 0.0, 2.0, 0.0, 1.0, float("nan")], dtype=torch.float64)
GROUPS = torch.tensor([0, 0, 0, 1, 1, 1])
LENGTHS = torch.tensor([3, 5, 2, 40, 7, 9])


def prepared(**axes: dict[str, Any]) -> Prepared:
    return Recipe(algorithm(**axes), "none", 40).prepare(Rewarded(REWARDS, GROUPS, LENGTHS, "v"))


def test_an_estimator_of_ones_own_is_a_baseline_like_any_other() -> None:
    ours = prepared(baseline={"kind": "dr_grpo"})
    mine = prepared(baseline={"kind": HERE + "centred"})
    assert torch.equal(mine.advantages_B, ours.advantages_B)
    assert torch.equal(mine.token_weights_B, ours.token_weights_B)
    assert mine.metrics == {"mine/groups": 2.0}
    twice = prepared(baseline={"kind": HERE + "centred", "args": {"scale": 2.0}})
    assert torch.equal(twice.advantages_B, 2 * ours.advantages_B)


def test_a_choice_of_ones_own_is_among_what_the_keys_leave() -> None:
    """Lengths of at least 4 leave out two; PODS leaves two of each group before that."""
    mine = {"kind": HERE + "keep_long", "args": {"least": 4}}
    found = prepared(rollout=mine, baseline={"kind": "none"})
    assert found.kept_B.tolist() == [False, True, False, True, True, False]
    assert found.metrics == {"mine/before": 4.0, "mine/after": 4.0}
    both = prepared(rollout={**mine, "max_variance_share": 2 / 3}, baseline={"kind": "none"})
    assert both.kept_B.tolist() == [False, True, False, True, True, False]
    assert both.advantages_B.tolist() == [0.0, 0.0, 0.0, 0.0, 1.0, 0.0]
    after = prepared(rollout={**mine, "prune_rate": 0.5}, baseline={"kind": "none"})
    assert after.kept_B.sum() == 1  # of 1 and 2 left in the groups, CPPO keeps 0 and 1


def test_an_aggregation_of_ones_own() -> None:
    mine, ours = prepared(aggregation={"kind": HERE + "one_each"}), prepared()
    torch.testing.assert_close(mine.token_weights_B, ours.token_weights_B)
    assert mine.metrics == {"mine/tokens": float(LENGTHS[:5].sum())}


def test_rules_of_tokens_of_ones_own_reach_the_loss_and_the_record() -> None:
    batch = random_batch(0, [4, 0, 9])
    batch.reference_logprobs_N = None
    plain = policy_loss(batch, algorithm(), "none")
    tokens = float(batch.loss_mask_N.sum())

    credited = policy_loss(batch, algorithm(credit={"kind": HERE + "halves"}), "none")
    torch.testing.assert_close(credited.loss, plain.loss / 2)
    assert credited.metrics["mine/half"] == (tokens / 2, tokens)

    free = {"kind": "ppo", "clip_low": float("inf"), "clip_high": float("inf")}
    mine = policy_loss(batch, algorithm(objective={"kind": HERE + "unclipped"}), "none")
    torch.testing.assert_close(
        mine.loss, policy_loss(batch, algorithm(objective=free), "none").loss
    )
    trained_B = torch.tensor([p.sum() for p in batch.loss_mask_N.split([4, 0, 9])])
    expected = float((trained_B * batch.advantages_B).sum())
    assert mine.metrics["mine/advantage"] == pytest.approx((expected, tokens))

    # Weights of ratio^2 are truncated importance sampling of twice the log-ratio, uncapped.
    weighted = policy_loss(batch, algorithm(), HERE + "squared")
    gap_N = (batch.old_logprobs_N - batch.behaviour_logprobs_N).nan_to_num(0.0)
    sampled_N = batch.behaviour_logprobs_N.where(batch.behaviour_logprobs_N.isnan(), 0.0) * 0
    batch.behaviour_logprobs_N = batch.old_logprobs_N - 2 * gap_N + sampled_N
    uncapped = algorithm(correction={"cap": float("inf")})
    torch.testing.assert_close(weighted.loss, policy_loss(batch, uncapped, "tis").loss)
    assert "mine/ratio" in weighted.metrics


class RunningMean(Rule[GroupedRewards, Advantages]):
    """Reward less the mean reward of all steps so far."""

    def __init__(self, config: BaselineConfig, start: float = 0.0) -> None:
        self.total, self.count = start, 0

    def __call__(self, inputs: GroupedRewards) -> Advantages:
        self.total += float(inputs.rewards_V.sum())
        self.count += len(inputs.rewards_V)
        mean = self.total / max(self.count, 1)
        return Advantages(inputs.rewards_V - mean, metrics={"mine/mean": mean})

    def state_dict(self) -> dict[str, Any]:
        return {"total": self.total, "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.total, self.count = state["total"], state["count"]


class Steps(LearnedAggregation):
    """Weights that double with every step taken."""

    def __init__(self, config: AggregationConfig) -> None:
        self.steps = 0

    def __call__(self, inputs: KeptCompletions) -> TokenWeights:
        return TokenWeights(torch.full((len(inputs.lengths_V),), 2.0**self.steps).double())

    def end_step(self, kept: KeptCompletions, surrogate_sums_V: Tensor) -> Mapping[str, float]:
        assert len(surrogate_sums_V) == len(kept.lengths_V)
        self.steps += 1
        return {"mine/steps": float(self.steps)}

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]


def test_classes_remember_and_are_kept_in_checkpoints() -> None:
    kinds = {"baseline": HERE + "RunningMean", "aggregation": HERE + "Steps"}
    config = algorithm(**{axis: {"kind": kind} for axis, kind in kinds.items()})
    recipe = Recipe(config, "none", 40)
    means = []
    for step in range(3):
        found = recipe.prepare(Rewarded(REWARDS + step, GROUPS, LENGTHS, "v"))
        means.append(found.metrics["mine/mean"])
        assert set(found.token_weights_B.tolist()) == {0.0, 2.0**step}
        assert recipe.end_step(torch.zeros(6)) == {"mine/steps": step + 1.0}
    assert means == pytest.approx([4 / 5, (4 + 9) / 10, (4 + 9 + 14) / 15])
    resumed = Recipe(config, "none", 40)
    resumed.load_state_dict(recipe.state_dict())
    for each in (recipe, resumed):
        found = each.prepare(Rewarded(REWARDS, GROUPS, LENGTHS, "v"))
        assert found.metrics["mine/mean"] == pytest.approx((4 + 9 + 14 + 4) / 20)
        assert found.token_weights_B[0] == 8.0


def test_after_a_change_of_rule_at_a_resume_the_new_one_begins_anew() -> None:
    learned = Recipe(algorithm(aggregation={"kind": "lambda_grpo", "lambda_init": 0.25}), "none", 9)
    state = learned.state_dict()
    other = Recipe(algorithm(aggregation={"kind": HERE + "Steps"}), "none", 9)
    other.load_state_dict(state)
    assert other.state_dict()["aggregation"]["state"] == {"steps": 0}
    other.load_state_dict({})  # a checkpoint from before this rule was there


# What is refused before anything starts.


def wrong_type(inputs: Any, config: Any) -> Any:
    return torch.zeros(3)


def of_one_argument(inputs: Any) -> Any:
    raise AssertionError


def raises(inputs: Any, config: Any) -> Any:
    raise KeyError("nothing")


class NotDerived:
    pass


class Unsaveable(RunningMean):
    def state_dict(self) -> dict[str, Any]:
        return {"total": torch.zeros(1)}


A_NUMBER = 3


@pytest.mark.parametrize("name", AXES)
@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("no_such", "cannot be imported: AttributeError.*importable from the directory"),
        ("A_NUMBER", "is of type int, neither a function nor a class"),
        ("wrong_type", r"returned a Tensor: return a learner\.algorithm\."),
        ("of_one_argument", r"raised TypeError.*called as function\(\w+, \w+Config, \*\*args\)"),
        ("raises", "raised KeyError: 'nothing'"),
        ("NotDerived", "is a class: (derive it from learner.algorithm.axis.Rule|give a function)"),
    ],
)
def test_what_is_no_rule_is_refused_on_every_axis(name: str, rule: str, message: str) -> None:
    refused(name, HERE + rule, rf"algorithm\.{name}\.kind={HERE}{rule}.*{message}")


def refused(name: str, kind: str, message: str, **keys: Any) -> None:
    config = algorithm(**{name: {"kind": kind, **keys}})
    with pytest.raises(UserError, match=message):
        check_recipe(config, kind if name == "correction" else "none")


def test_a_rule_that_is_nowhere_is_refused() -> None:
    for wrong in ("no_such_module:rule", ":rule", HERE):
        refused("credit", wrong, "cannot be imported")
    refused("baseline", HERE + "center", "no attribute 'center' .did you mean centred")


def scalar(inputs: CreditInputs, config: CreditConfig) -> Credit:
    one = torch.ones(())
    return Credit(inputs.log_ratio_N, one, one, one)


def not_finite(inputs: CreditInputs, config: CreditConfig) -> Credit:
    bad_N = torch.full_like(inputs.log_ratio_N, float("nan"))
    return Credit(inputs.log_ratio_N, bad_N, bad_N, bad_N)


def credit_without_gradient(inputs: CreditInputs, config: CreditConfig) -> Credit:
    x_N = inputs.log_ratio_N.detach()
    return Credit(x_N, x_N, x_N, x_N)


def not_for_nothing(inputs: CreditInputs, config: CreditConfig) -> Credit:
    assert inputs.entropy_N is not None
    weight_N = inputs.entropy_N / inputs.entropy_N.max()  # of no tokens there is none
    return Credit(inputs.log_ratio_N, weight_N, weight_N, weight_N)


def values_without_gradient(terms: Terms, config: ObjectiveConfig) -> Surrogate:
    values_N = terms.logprobs_N
    return Surrogate(values_N, torch.zeros_like(values_N, dtype=torch.bool))


def clipped_as_numbers(terms: Terms, config: ObjectiveConfig) -> Surrogate:
    return Surrogate(terms.log_ratio_N, torch.zeros_like(terms.log_ratio_N))


def divided_by_std(grouped: GroupedRewards, config: BaselineConfig) -> Advantages:
    return Advantages(grouped.centred_V / grouped.sum(grouped.centred_V**2).sqrt())


def indices(sampled: Sampled, config: RolloutConfig) -> Chosen:
    return Chosen(torch.arange(len(sampled.lengths_B)))


def metric_of_ours(inputs: CorrectionInputs, config: CorrectionConfig) -> Correction:
    return Correction(inputs.ratio_N, {"is_ratio/mean": inputs.ratio_N})


def metric_with_a_space(inputs: CorrectionInputs, config: CorrectionConfig) -> Correction:
    return Correction(inputs.ratio_N, {"my ratio": inputs.ratio_N})


def metric_of_one_number(inputs: CorrectionInputs, config: CorrectionConfig) -> Correction:
    return Correction(inputs.ratio_N, {"mine/mean": inputs.ratio_N.mean()})


def metric_of_many_numbers(grouped: GroupedRewards, config: BaselineConfig) -> Advantages:
    metrics: dict[str, Any] = {"mine/rewards": grouped.rewards_V}
    return Advantages(grouped.rewards_V, metrics=metrics)


@pytest.mark.parametrize(
    ("name", "rule", "message"),
    [
        ("credit", "scalar", r"tokens, its weight_N must hold one finite value each"),
        ("credit", "not_finite", "its weight_N must hold one finite value each"),
        ("credit", "credit_without_gradient", "without the gradient of inputs.log_ratio_N: keep"),
        ("credit", "not_for_nothing", r"tried on completions of \[0\] tokens, raised"),
        ("objective", "values_without_gradient", "without the gradient of terms.log_ratio_N"),
        ("objective", "clipped_as_numbers", "its clipped_N must hold one true or false each"),
        ("baseline", "divided_by_std", r"tried on .*, its advantages_V must hold one fin"),
        ("rollout", "indices", "tried on three completions before.*kept_B must hold one true or"),
        (
            "correction",
            "metric_of_ours",
            "'is_ratio/mean', which is one of ours: call it otherwise",
        ),
        ("correction", "metric_with_a_space", "'my ratio': call it like"),
        ("correction", "metric_of_one_number", r"metric 'mine/mean' must hold.*of shape \[4\]"),
        ("baseline", "metric_of_many_numbers", "as metric 'mine/rewards': return a finite number"),
        ("baseline", "Unsaveable", "Tensor is not JSON serializable"),
    ],
)
def test_an_answer_that_cannot_be_used_is_refused(name: str, rule: str, message: str) -> None:
    refused(name, HERE + rule, message)


def test_arguments_must_be_the_rule_s() -> None:
    refused("baseline", HERE + "centred", "unexpected keyword.*scal'", args={"scal": 2})
    refused(
        "baseline", "grpo", "baseline.args.a is no argument of grpo: it takes none", args={"a": 1}
    )


@pytest.mark.parametrize(
    ("name", "kind", "args", "message"),
    [
        ("objective", "sapo", {"tau_positiv": 1.0}, r"tau_positiv .*did you mean tau_positive"),
        ("objective", "sapo", {"tau_positive": 0.0}, r"tau_positive=0.0 must be greater than 0 "),
        ("objective", "dppo", {"divergence": "js"}, r"divergence=js must be one of tv, kl"),
        ("objective", "ppo", {"dual_clip": 1.0}, r"dual_clip=1.0 must be greater than 1"),
        ("objective", "vespo", {"power_positive": "x"}, r"power_positive=x must be a float"),
        ("correction", "sequence_mask", {"weigh": 1}, r"weigh=1 must be a bool"),
        ("correction", "icepop", {"low": float("nan")}, r"low=nan must be at least 0"),
        ("baseline", "quantile", {"quantile": 1.5}, r"quantile=1.5 must be in \(0, 1\]"),
    ],
)
def test_arguments_of_our_rules_have_names_types_and_bounds(
    name: str, kind: str, args: dict[str, Any], message: str
) -> None:
    refused(name, kind, message, args=args)


def test_every_argument_of_our_rules_has_a_default_and_every_number_a_bound() -> None:
    numbers = 0
    for axis in AXES.values():
        for kind, rule in axis.rules.items():
            hints = get_type_hints(rule, include_extras=True)
            for name, parameter in parameters(rule).items():
                assert parameter.default is not parameter.empty, (kind, name)
                if isinstance(parameter.default, float):
                    assert parameter.default in (bound_of(hints[name]) or ()), (kind, name)
                    numbers += 1
    assert numbers > 8


def same_name(kept: KeptCompletions, config: AggregationConfig) -> TokenWeights:
    return TokenWeights(kept.lengths_V.double(), {"mine/groups": 1.0})


def test_two_rules_cannot_record_the_same_metric() -> None:
    config = algorithm(
        baseline={"kind": HERE + "centred"}, aggregation={"kind": HERE + "same_name"}
    )
    with pytest.raises(UserError, match=r"baseline\.kind.*aggregation\.kind both.*mine/groups"):
        check_recipe(config, "none")


def not_of_large_rewards(grouped: GroupedRewards, config: BaselineConfig) -> Advantages:
    return Advantages(grouped.rewards_V.masked_fill(grouped.rewards_V > 100, float("nan")))


def test_an_estimator_that_fails_later_ends_the_run_by_its_name() -> None:
    recipe = Recipe(algorithm(baseline={"kind": HERE + "not_of_large_rewards"}), "none", 16)
    with pytest.raises(RunError, match=f"kind={HERE}not_of_large_rewards its advant"):
        recipe.prepare(Rewarded(REWARDS * 1000, GROUPS, LENGTHS, "v"))


@pytest.mark.parametrize(
    ("key", "right"),
    [
        ("rollout.kind=al", "all"),
        ("baseline.kind=dr_grpoo", "dr_grpo"),
        ("credit.kind=lamda_trace", "lambda_trace"),
        ("objective.kind=cipso", "cispo"),
        ("correction.kind=tiss", "tis"),
        ("aggregation.kind=token_men", "token_mean"),
    ],
)
def test_a_misspelt_rule_gets_the_nearest_name(key: str, right: str) -> None:
    with pytest.raises(
        UserError, match=f"algorithm.{key} is not known .did you mean {right}..: use"
    ):
        load_config([], ["model.path=x", f"algorithm.{key}"])


def test_arguments_are_given_on_the_command_line() -> None:
    keys = [f"algorithm.baseline.kind={HERE}centred", "algorithm.baseline.args.scale=3.0"]
    config = load_config([], ["model.path=x", *keys])
    found = Recipe(config.algorithm, "none", 40).prepare(Rewarded(REWARDS, GROUPS, LENGTHS, "v"))
    assert found.advantages_B[2] == 3.0


def test_the_page_lists_the_arguments() -> None:
    text = PAGE.read_text()
    assert text == with_table(text), "run python tests/support/rule_arguments.py"
