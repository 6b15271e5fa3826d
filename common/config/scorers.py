"""What a scorer goes together with; `deploy.models.teacher` looks at a teacher itself."""

from __future__ import annotations

import re

from common.config.algorithm import SCORED
from common.config.contexts import context_template
from common.config.sections import Config
from common.errors import UserError

_KEY = "algorithm.advantage"


def check_scorer(config: Config) -> None:
    """Raise `UserError` unless scorer, rule, context and model go together."""
    _check_readers(config)
    _check_context(config)
    _check_consistency(config)
    scorer = config.algorithm.advantage.scorer
    if config.teacher.path is not None and scorer != "teacher":
        raise UserError(
            f"teacher.path={config.teacher.path} and nobody asks the teacher: set "
            f"{_KEY}.scorer=teacher, or teacher.path=null"
        )
    _check_pool(config)
    if config.teacher.offload and config.teacher.path is None:
        raise UserError("teacher.offload is that of teacher.path, which is null: name a teacher")
    if scorer is not None and config.learner.credit_log_every != 1:
        raise UserError(
            f"learner.credit_log_every={config.learner.credit_log_every} and "
            f"{_KEY}.scorer={scorer}: the scores of a step stand in its credit log, "
            "and steps without them could not be replayed; set it to 1"
        )


def _check_pool(config: Config) -> None:
    """What a teacher in generators of its own can score."""
    teacher, temperature = config.teacher, config.generator.temperature
    if not teacher.count:
        return
    key = f"teacher.count={teacher.count}"
    if teacher.path is None:
        raise UserError(f"{key} is that of teacher.path, which is null: name a teacher")
    if teacher.offload:
        raise UserError(f"{key} has the teacher in processes of its own: set teacher.offload=false")
    if temperature != 1.0:
        raise UserError(
            f"{key} and generator.temperature={temperature:g}: vLLM scores at temperature 1, and "
            "the policy would be compared at another; set it to 1, or teacher.count=0"
        )
    if config.algorithm.advantage.context != "prompt" or config.environment.command is not None:
        raise UserError(
            f"{key} scores completions behind their own prompt alone: set "
            f"{_KEY}.context=prompt and no environment.command, or teacher.count=0"
        )
    if config.transport.shares_devices:
        raise UserError(
            f"{key} needs devices of its own, and weights.transport={config.weights.transport} has "
            "generators and learner take turns on theirs: set teacher.count=0"
        )


def _check_readers(config: Config) -> None:
    """A scorer is there for who goes by it."""
    advantage, consistency = config.algorithm.advantage, config.algorithm.rollout.consistency
    kind, scorer = advantage.kind, advantage.scorer
    if scorer is None and (kind in SCORED or consistency.weight):
        who = f"{_KEY}.kind={kind}"
        if kind not in SCORED:
            who = f"algorithm.rollout.consistency.weight={consistency.weight:g}"
        raise UserError(
            f"{who} goes by the log-probabilities of another model: set {_KEY}.scorer to teacher, "
            "reference, ema or policy"
        )
    if scorer is not None and kind not in SCORED and ":" not in kind and not consistency.weight:
        raise UserError(
            f"{_KEY}.kind={kind} reads no scores: set {_KEY}.scorer=null, or use one of "
            f"{', '.join(SCORED)}"
        )
    if kind in SCORED and scorer == "policy" and advantage.context == "prompt":
        raise UserError(
            f"{_KEY}.scorer=policy reads what the policy read, and says what it said: set "
            f"{_KEY}.context, or use another scorer"
        )


def _check_context(config: Config) -> None:
    """A context can be made for this data, and is read."""
    advantage = config.algorithm.advantage
    context, environment = advantage.context, config.environment
    if context == "prompt":
        if advantage.context_template is not None:
            raise UserError(
                f"{_KEY}.context_template is that of {_KEY}.context, which is prompt: set it to "
                "answer, solution, sibling or feedback"
            )
        return
    key = f"{_KEY}.context={context}"
    if advantage.scorer is None or (advantage.kind not in SCORED and ":" not in advantage.kind):
        raise UserError(f"{key} is read by no rule: set it to prompt, or use {', '.join(SCORED)}")
    context_template(context, advantage.context_template)
    if config.algorithm.rollout.consistency.weight:
        raise UserError(
            f"{key} and algorithm.rollout.consistency.weight: the bonus goes by what a scorer says "
            "under the completion's own prompt; set one of them off"
        )
    if environment.command is not None:
        raise UserError(
            f"{key} and environment.command: its conversations have prompts of their own; set "
            f"{_KEY}.context=prompt"
        )
    if context == "feedback" and environment.name is None:
        raise UserError(f"{key} needs an environment that says something: set environment.name")
    if context == "sibling" and environment.name is not None:
        raise UserError(
            f"{key} and environment.name={environment.name}: episodes have turns, which cannot "
            "stand inside a question; use feedback"
        )


def _check_consistency(config: Config) -> None:
    """The bonus for consistent answers, and what it cannot stand beside."""
    consistency, key = config.algorithm.rollout.consistency, "algorithm.rollout.consistency"
    if not consistency.weight:
        return
    try:
        re.compile(consistency.pattern)
    except re.error as error:
        raise UserError(f"{key}.pattern is no regular expression: {error}") from error
    if config.algorithm.rollout.dynamic_sampling:
        raise UserError(
            "algorithm.rollout.dynamic_sampling=true drops groups of equal rewards, to which "
            f"{key}.weight may give a signal: set one of the two off"
        )
    if config.environment.playing:
        raise UserError(
            f"{key}.weight is for answers, and an environment plays episodes: set it to 0"
        )
