"""What a configuration does that its numbers do not show: said by `plan` and by a run's start."""

from __future__ import annotations

from common.config.sections import Config

_CLIPPED = ("ppo", "gspo", "gmpo", "cispo", "sapo", "dppo", "vespo")
"""Objectives whose bound depends on the ratio."""


def notes(config: Config) -> list[str]:
    """Sentences for people; none where there is nothing to say."""
    found = (_idle_clip(config), _fewer_updates(config), _length_preference(config))
    return [note for note in found if note is not None]


def updates_of(config: Config) -> int:
    """Optimiser steps of one epoch over a batch: at most one for each prompt."""
    return min(config.algorithm.objective.updates_per_batch, config.groups_per_step)


def _idle_clip(config: Config) -> str | None:
    objective = config.algorithm.objective
    moves = objective.epochs > 1 or updates_of(config) > 1 or objective.anchor == "behaviour"
    if moves or objective.kind not in _CLIPPED:
        return None
    return (
        f"the clip of algorithm.objective.kind={objective.kind} cannot act: with one update a "
        "batch the ratio is 1. algorithm.objective.updates_per_batch or epochs above 1 let it, "
        "and anchor=behaviour where sampler and learner differ"
    )


def _fewer_updates(config: Config) -> str | None:
    asked = config.algorithm.objective.updates_per_batch
    if asked <= config.groups_per_step:
        return None
    return (
        f"algorithm.objective.updates_per_batch={asked} is more than the {config.groups_per_step} "
        "prompts of a step: each prompt is an update"
    )


def _length_preference(config: Config) -> str | None:
    """How much more a whole long answer counts than a short one under a trace as it is."""
    credit, kind = config.algorithm.credit, config.algorithm.aggregation.kind
    if credit.kind != "lambda_trace" or credit.normalize != "none" or kind != "sequence_mean":
        return None
    limit = config.generator.max_completion_tokens
    short = max(1, limit // 10)
    decay = credit.gamma * credit.lambda_
    times = _mean_credit(decay, limit) / _mean_credit(decay, short)
    if credit.trace != "recent" or times < 1.5:
        return None
    return (
        f"a trace as it is prefers length: an answer of {limit} tokens has {times:.1f} times the "
        f"credit of one of {short}. algorithm.credit.normalize=mean takes that away"
    )


def _mean_credit(decay: float, tokens: int) -> float:
    """Mean over t of sum_(k >= t) decay^(k - t), the weight of a token under `recent` [D]."""
    if decay == 1:
        return (tokens + 1) / 2
    return 1 / (1 - decay) - decay * (1 - decay**tokens) / (tokens * (1 - decay) ** 2)
