"""What a configuration does that its numbers do not show: said by `plan` and by a run's start."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from common.config.algorithm import CreditConfig
from common.config.sections import AdapterConfig, Config
from learner.algorithm.objectives import uses_ratio
from learner.algorithm.traces import LambdaTrace, PackedAxis
from learner.training.memory import MASTER

_SHORT = 20
"""Tokens of a short answer, where the limit is high: a raw trace has reached its size soon."""

_LEAST_ADAPTER_RATE = 1e-5
"""Ten times the 1e-6 that is usual where large models are fine-tuned in full (TRL)."""
_LAYERS = ("", "recipe", "file", "command")
"""First words of the origins of a value, the later the stronger."""


def notes(config: Config, origins: Mapping[str, str] | None = None) -> list[str]:
    """Sentences for people; none where there is nothing to say.

    Args:
        origins: where values came from, by key (`common.config.load.Loaded`), where that is known.
    """
    rules = (
        _idle_clip,
        _fewer_updates,
        _length_preference,
        _follow_ups,
        _scaffold,
        _scorer,
        _critic,
        _eight_bits,
    )
    found = [*(rule(config) for rule in rules), _adapter_rate(config, origins or {})]
    return [note for note in found if note is not None]


def updates_of(config: Config) -> int:
    """Optimiser steps of one epoch over a batch: at most one for each prompt."""
    return min(config.algorithm.objective.updates_per_batch, config.groups_per_step)


def _idle_clip(config: Config) -> str | None:
    objective = config.algorithm.objective
    several = objective.epochs > 1 or updates_of(config) > 1 or objective.isolate_below is not None
    moves = several or objective.anchor == "behaviour"
    if moves or not uses_ratio(objective):
        return None
    return (
        f"the clip of algorithm.objective.kind={objective.kind}, or what else it does with the "
        "ratio, cannot act: with one update a batch the ratio is 1. "
        "algorithm.objective.updates_per_batch or epochs above 1 let it, and anchor=behaviour "
        "where sampler and learner differ"
    )


def _fewer_updates(config: Config) -> str | None:
    asked = config.algorithm.objective.updates_per_batch
    if asked <= config.groups_per_step:
        return None
    return (
        f"algorithm.objective.updates_per_batch={asked} is more than the {config.groups_per_step} "
        "prompts of a step: each prompt is an update"
    )


def _scorer(config: Config) -> str | None:
    """What a scorer costs."""
    scorer = config.algorithm.advantage.scorer
    if scorer is None:
        return None
    if scorer == "reference" and config.model.adapter.rank:
        return (
            "algorithm.advantage.scorer=reference adds a forward pass over all completions to "
            "every step, with the adapters off: no second model"
        )
    if scorer == "teacher" and config.teacher.count:
        return (
            f"teacher.count={config.teacher.count} generator(s) of {config.teacher.path} score the "
            f"completions before every step, on {config.teacher.tensor_parallel} device(s) each "
            "besides those that are planned here"
        )
    model = config.teacher.path if scorer == "teacher" else config.model.path
    holds = f"has every rank hold its shard of {model} in model.dtype, and "
    if scorer == "policy":
        holds = "holds no other model, and "
    elif scorer == "ema":
        holds = "has every rank hold its shard of a moving average in float32, and "
    elif config.teacher.offload:
        holds = f"keeps {model} on the host between its passes, and "
    more = ""
    if config.algorithm.advantage.against == "policy":
        more = ". algorithm.advantage.against=policy adds one of the policy besides"
    return (
        f"algorithm.advantage.scorer={scorer} {holds}adds a forward pass over all completions to "
        f"every step: a third of the passes of a model of the policy's size{more}"
    )


def _eight_bits(config: Config) -> str | None:
    """A sampler that is not the policy, and nothing that weighs the difference."""
    kind = config.generator.quantization
    weighed = config.correction_kind != "none"
    if kind is None or weighed or config.algorithm.objective.anchor == "behaviour":
        return None
    return (
        f"sampled with {kind}, trained with {config.model.dtype}, and nothing corrects the gap: "
        "set algorithm.correction.kind=tis (auto does so), or algorithm.objective.anchor=behaviour"
    )


def _follow_ups(config: Config) -> str | None:
    """What is sampled beside the completions that the learner gets."""
    follow_up, size = config.algorithm.rollout.follow_up, config.batch.group_size
    if follow_up.kind == "none":
        return None
    branch = follow_up.branch
    said = {
        "refine": f"samples {follow_up.drafts} drafts for every {size} completions that are "
        "trained on, which is not in the figures here",
        "hint": f"samples {size} completions more for every group that fails",
        "critique": f"asks for the last of every {size} completions when the others are judged: a "
        "group is sampled in two goes, and not in more tokens",
        "branches": f"samples up to {branch.samples * branch.most} continuations of every "
        f"completion, {branch.samples} for each of up to {branch.most} branches: by far most of "
        "the tokens, and not in the figures here",
        "tree": f"has a group ask {follow_up.stages} time(s) for more behind each other. The "
        "figures here have every node split, and every completion whole and sampled at once: they "
        f"are the most there can be{_unreached(config)}",
    }
    own = "asks for completions by a rule of your own, which are not in the figures here"
    return f"algorithm.rollout.follow_up.kind={follow_up.kind} {said.get(follow_up.kind, own)}"


def _unreached(config: Config) -> str:
    """Levels of a tree that no completion is long enough for."""
    tree, longest = (
        config.algorithm.rollout.follow_up.tree,
        config.generator.max_completion_tokens,
    )
    levels, reached = len(tree.children), tree.reached(longest)
    if reached == levels:
        return ""
    return (
        f". With algorithm.rollout.follow_up.tree.every={tree.every} the last {levels - reached} "
        f"of {levels} levels would begin behind generator.max_completion_tokens={longest}: no node "
        "there splits. Lower it, or name fewer children"
    )


def _scaffold(config: Config) -> str | None:
    """How long a rubric is shown."""
    scaffold, size = config.algorithm.rollout.scaffold, config.batch.group_size
    if scaffold.kind != "rubric":
        return None
    share = f"algorithm.rollout.scaffold.kind=rubric shows criteria to up to {size - 1} of {size} "
    if scaffold.decay == "none" or not scaffold.share:
        return share + "completions, at all steps alike"
    half = round(scaffold.midpoint * config.steps)
    return share + f"completions, half as many at step {half} of {config.steps} as at the start"


def _critic(config: Config) -> str | None:
    """What a critic costs."""
    if not config.algorithm.needs_critic:
        return None
    held = config.algorithm.advantage.critic.pretrain_steps
    first = f" The policy does not move in the first {held} steps." if held else ""
    twice = "weights and optimiser twice, in memory and in checkpoints,"
    if config.model.adapter.rank:
        twice = "frozen weights, adapters and optimiser twice in memory,"
    return (
        f"algorithm.advantage.kind=gae trains a critic as large as the policy beside it: {twice} "
        f"and a learner step of a little over twice the passes.{first}"
    )


def _adapter_rate(config: Config, origins: Mapping[str, str]) -> str | None:
    """Whether adapters were left with the learning rate of full fine-tuning.

    They were where a later layer turns them on than sets the rate, or where that is below any that
    is usual. A rate that is the default may stand in a file all the same.
    """
    rank, rate = config.model.adapter.rank, config.learner.learning_rate
    layers = origins.get("model.adapter.rank", ""), origins.get("learner.learning_rate", "file")
    turned_on, rated = (_LAYERS.index(layer.partition(" ")[0]) for layer in layers)
    if not rank or (turned_on <= rated and rate >= _LEAST_ADAPTER_RATE):
        return None
    return (
        f"adapters (model.adapter.rank={rank}) learn at about ten times the learning rate of full "
        f"fine-tuning, and learner.learning_rate={rate:g} looks like that: try {10 * rate:g}"
    )


def adapter_line(adapter: AdapterConfig, trained: int, base: int) -> str:
    """What adapters train, for a plan."""
    return (
        f"{trained / 1e6:.2f} of {(base + trained) / 1e6:.1f} million parameters "
        f"({trained / (base + trained):.1%}): adapters of model.adapter.rank {adapter.rank} on "
        f"{adapter.targets}"
    )


def publish_line(config: Config, trained: int, base: int) -> str:
    """What travels to the generators at every step, for a plan."""
    merged = (2 if config.model.dtype == "bfloat16" else MASTER) * base / 1e6
    if config.served_adapter is None:
        return f"all weights, adapters merged: {merged:.1f} MB a version"
    return (
        f"the adapters alone, {MASTER * trained / 1e6:.1f} MB a version; merged, all weights would "
        f"be {merged:.1f} MB. On a CPU vLLM samples several times slower so (learner/README.md)"
    )


def _length_preference(config: Config) -> str | None:
    """How much more a token of a long answer counts than one of a short under a trace as it is."""
    credit = config.algorithm.credit
    if credit.kind != "lambda_trace" or credit.normalize != "none":
        return None
    if credit.args.get("weighted_mean"):
        return None
    limit = config.generator.max_completion_tokens
    short = max(1, min(limit // 10, _SHORT))
    times = _mean_credit(credit, limit) / _mean_credit(credit, short)
    if 2 / 3 < times < 1.5:
        return None
    what = "prefers length" if times > 1 else "prefers short answers"
    return (
        f"a trace as it is {what}: a token of an answer of {limit} tokens has on average "
        f"{times:.2g} times the credit of one in an answer of {short}. "
        "algorithm.credit.normalize=mean takes that away"
    )


def _mean_credit(credit: CreditConfig, tokens: int) -> float:
    """Mean credit of the tokens of an answer, its border of turns and its cut left out."""
    axis = PackedAxis(torch.tensor([tokens]))
    trace = LambdaTrace(axis, credit.trace, credit.gamma * credit.lambda_)
    return float(trace.weights(torch.ones(tokens, dtype=torch.float64)).mean())
