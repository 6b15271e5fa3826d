"""What a recipe refuses: values out of their bound, and choices that contradict each other."""

from __future__ import annotations

import itertools
from dataclasses import replace

from common.config.algorithm import QUIET, AlgorithmConfig, CreditConfig
from common.config.bounds import check_bounds
from common.errors import UserError
from learner.algorithm.advantages import BASELINES
from learner.algorithm.aggregation import AGGREGATIONS
from learner.algorithm.corrections import CORRECTIONS
from learner.algorithm.credit import CREDITS
from learner.algorithm.objectives import OBJECTIVES
from learner.algorithm.selection import ROLLOUTS
from learner.algorithm.token_advantages import ADVANTAGES


def check_recipe(config: AlgorithmConfig, correction_kind: str) -> None:
    """Raise `UserError` for a value out of its bound, or values that contradict each other."""
    check_bounds(config, "algorithm.")
    credit = config.credit
    _check_tokens(config)
    _check_greedy(config)
    _check_isolation(config)
    if config.objective.anchor == "behaviour":
        _check_anchor(credit, correction_kind)
    if config.objective.kl_in == "reward" and config.objective.kl_estimator != "k3":
        raise UserError(
            f"algorithm.objective.kl_estimator={config.objective.kl_estimator} is for the KL in "
            "the loss, and algorithm.objective.kl_in=reward takes an estimate of its own off the "
            "reward: use kl_in=loss, or leave kl_estimator at k3"
        )
    traced = credit.kind == "lambda_trace" and credit.application == "trace"
    if traced and credit.cut and correction_kind != "none":
        raise UserError(
            "algorithm.credit.cut=true needs algorithm.credit.application=weight under a "
            "correction: see learner/algorithm/traces.py"
        )
    _try_rules(config, correction_kind)


def _check_tokens(config: AlgorithmConfig) -> None:
    """Refuse what has no meaning where tokens of a completion differ in advantage, or by turns."""
    kind, credit = config.advantage.kind, config.credit
    if kind != "completion" and config.objective.kind == "gmpo":
        raise UserError(
            f"algorithm.objective.kind=gmpo has one advantage a completion, and "
            f"algorithm.advantage.kind={kind} gives one a token: use another objective"
        )
    if kind not in QUIET and config.rollout.dynamic_sampling:
        raise UserError(
            "algorithm.rollout.dynamic_sampling=true drops groups of equal rewards, to which "
            f"algorithm.advantage.kind={kind} may give a signal: set one of the two off"
        )
    if config.needs_critic:
        _check_critic(config)
    if kind in ("branch_values", "tree_values"):
        _check_continued(config)
    if credit.turn_decay is not None and (credit.kind != "lambda_trace" or credit.trace == "both"):
        raise UserError(
            f"algorithm.credit.turn_decay={credit.turn_decay} is for algorithm.credit.kind="
            "lambda_trace with algorithm.credit.trace recent or terminal: `both` goes by the "
            "place of a token in the whole completion"
        )


def _check_continued(config: AlgorithmConfig) -> None:
    """Refuse rewards that continuations do not have, and what leaves completions out by rewards."""
    rollout, objective = config.rollout, config.objective
    wrong = {
        "algorithm.rollout.overlong_penalty_share": (
            rollout.overlong_penalty_share * rollout.overlong_penalty_factor > 0
        ),
        "algorithm.objective.kl_in=reward": objective.kl > 0 and objective.kl_in == "reward",
        "algorithm.rollout.consistency.weight": rollout.consistency.weight > 0,
        "algorithm.rollout.prune_rate": rollout.prune_rate > 0,
        "algorithm.rollout.max_variance_share": rollout.max_variance_share < 1,
        "algorithm.objective.kind=gpg": objective.kind == "gpg",
    }
    if found := [name for name, is_wrong in wrong.items() if is_wrong]:
        raise UserError(
            f"{found[0]} changes or goes by the reward of a completion, and algorithm.advantage."
            f"kind={config.advantage.kind} compares that with the rewards of continuations: set it "
            "off"
        )


def _check_critic(config: AlgorithmConfig) -> None:
    """Refuse what goes by the advantages of completions, which a critic takes the place of."""
    rollout, baseline, objective = config.rollout, config.baseline, config.objective
    wrong = {
        f"algorithm.baseline.kind={baseline.kind}": baseline.kind != "none",
        "algorithm.baseline.min_advantage": baseline.min_advantage is not None,
        f"algorithm.rollout.max_variance_share={rollout.max_variance_share:g}": (
            rollout.max_variance_share < 1
        ),
        f"algorithm.rollout.prune_rate={rollout.prune_rate:g}": rollout.prune_rate > 0,
        f"algorithm.objective.kind={objective.kind}": objective.kind in ("gpg", "disco"),
    }
    if found := [name for name, is_wrong in wrong.items() if is_wrong]:
        raise UserError(
            f"{found[0]} goes by the rewards of a group, and algorithm.advantage.kind=gae by a "
            "critic that learns from all of them as they are: use algorithm.baseline.kind=none "
            "without min_advantage, neither max_variance_share nor prune_rate, and another "
            "objective than gpg and disco"
        )


def _check_greedy(config: AlgorithmConfig) -> None:
    """A greedy completion is there for `remax` or a rule of the user's own, not for the others."""
    rollout, kind = config.rollout, config.baseline.kind
    if rollout.greedy != (kind == "remax") and not (rollout.greedy and BASELINES.is_own(kind)):
        raise UserError(
            f"algorithm.rollout.greedy={str(rollout.greedy).lower()} and algorithm.baseline.kind="
            f"{kind} do not fit: remax compares with a greedy completion, which no other has"
        )
    if rollout.greedy and (rollout.max_variance_share < 1 or rollout.guidance.ratio > 0):
        raise UserError(
            "algorithm.rollout.greedy=true needs the first completion of every group as the policy "
            "alone says it: set algorithm.rollout.max_variance_share=1 and "
            "algorithm.rollout.guidance.ratio=0"
        )


def _check_isolation(config: AlgorithmConfig) -> None:
    """Refuse what moves all tokens of a completion together, where rare ones go ahead."""
    bound, kind, credit = config.objective.isolate_below, config.objective.kind, config.credit
    if bound is None:
        return
    traced = credit.kind == "lambda_trace" and credit.application == "trace"
    if kind in ("gspo", "gmpo") or traced:
        other = (
            "algorithm.credit.application=trace" if traced else f"algorithm.objective.kind={kind}"
        )
        raise UserError(
            f"algorithm.objective.isolate_below={bound:g} updates rare tokens apart from the "
            f"others, and algorithm.{other} gives a token the gradient of others: use another "
            "objective, algorithm.credit.application=weight, or isolate_below=null"
        )


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
        ADVANTAGES.key: ADVANTAGES.check(config.advantage),
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
