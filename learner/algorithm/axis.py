"""An axis of a recipe: its rules by name, and a user's own rule by its import path.

The `kind` of a section of `algorithm` is a name in the axis's table, or `package.module:name`:

    a function   called as function(inputs, config, **args), as those in the tables are
    a class      derived from `Rule`, made once a run as Class(config, **args). It may remember
                 something from step to step, and is saved in checkpoints. Only the axes that see
                 the whole batch take one; the others are called for a micro-batch of one rank.

`args` are those of the section in the configuration. A rule of ours declares its arguments as
keyword parameters, whose types carry bounds and whose defaults are the paper's. A rule of a user's
own is tried on made-up inputs before anything starts. What it returns may carry metrics, which
appear in metrics.jsonl under the names that it gives them.
"""

from __future__ import annotations

import functools
import json
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import (
    Any,
    Generic,
    Protocol,
    TypeVar,
    cast,
)

import torch
from torch import Tensor

from common.config.names import import_named
from common.errors import RunError, UserError
from common.record.metric_names import METRICS
from learner.algorithm.arguments import check_arguments, parameters
from learner.algorithm.choices import Chooser, TokenColumns


class AxisConfig(Protocol):
    """What the section of every axis has."""

    kind: str
    args: dict[str, Any]


class Answer(Protocol):
    """What a rule of any axis returns."""

    @property
    def metrics(self) -> Mapping[str, Any]: ...


Inputs = TypeVar("Inputs")
Config = TypeVar("Config", bound=AxisConfig)
Result = TypeVar("Result", bound=Answer)


class Rule(ABC, Generic[Inputs, Result]):
    """A rule with its configuration, ready to be called at every step.

    A class of a user's own is made as Class(config, **args). It may change from step to step by
    what it sees, which is the same on every rank.
    """

    @abstractmethod
    def __call__(self, inputs: Inputs) -> Result: ...

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of the rule, as JSON."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from the `state_dict` of a rule of the same `kind`."""


class _Function(Rule[Inputs, Result]):
    """A function as a rule. It remembers nothing."""

    def __init__(self, function: Callable[..., Result], config: AxisConfig) -> None:
        self._function = function
        self._config = config

    def __call__(self, inputs: Inputs) -> Result:
        return self._function(inputs, self._config, **self._config.args)


@dataclass(frozen=True)
class Axis(Generic[Inputs, Config, Result]):
    """The rules of one axis, and how a rule of a user's own is tried."""

    name: str
    """Name of its section in `algorithm`."""
    inputs: type[Inputs]
    result: type[Result]
    rules: Mapping[str, Callable[[Inputs, Config], Result] | type[Rule[Inputs, Result]]]
    cases: Mapping[str, Callable[[], Inputs]]
    """Made-up inputs that a rule is tried on, each under the words that an error has for it."""
    problem: Callable[[Inputs, Result], str | None]
    """Says what is wrong with a rule's answer; None where nothing is."""
    whole_batch: bool
    """Whether a rule sees the whole global batch, or else a micro-batch of one rank."""
    end_step: Callable[[Rule[Inputs, Result], Inputs], Mapping[str, float]] | None = None
    """Has a rule learn from a made-up step, on axes where rules learn; returns its metrics."""

    @property
    def key(self) -> str:
        return f"algorithm.{self.name}.kind"

    def is_own(self, kind: str) -> bool:
        """Whether `kind` is a rule of the user's own."""
        return kind not in self.rules

    def rule(self, config: Config) -> Rule[Inputs, Result]:
        """The rule that `config` names.

        Raises:
            UserError: there is none of that name, it cannot be imported from here, or it is no
                rule of this axis. The learner's ranks look for it where the run was started, and
                on PYTHONPATH.
        """
        found = self.rules.get(config.kind)
        if found is None:
            found = import_named(self.key, config.kind, tuple(self.rules))
        if not isinstance(found, type):
            return _Function(found, config)
        if not self.whole_batch:
            raise UserError(
                f"{self.key}={config.kind} is a class: give a function, since a rule of this axis "
                "is called for one micro-batch of one rank and has nothing to remember"
            )
        if not issubclass(found, Rule):
            raise UserError(
                f"{self.key}={config.kind} is a class: derive it from {Rule.__module__}.Rule, or "
                "give a function"
            )
        return cast(Callable[..., Rule[Inputs, Result]], found)(config, **config.args)

    def chooser(self, config: Config) -> Callable[[TokenColumns], Tensor] | None:
        """How the rule chooses among all tokens of an update; None where it does not."""
        rule = self.rules.get(config.kind)
        chooser: Chooser | None = getattr(rule, "chooser", None)
        if rule is None or chooser is None:
            return None
        given = {name: each.default for name, each in parameters(rule).items()} | config.args
        wanted = {name: given[name] for name in parameters(chooser)}
        return lambda columns: chooser(columns, config, **wanted)

    def chooses_of_all(self, config: Config) -> bool:
        """Whether the rule chooses also among tokens of completions without an advantage."""
        return bool(getattr(self.rules.get(config.kind), "of_all", False))

    def call(self, rule: Rule[Inputs, Result], kind: str, inputs: Inputs) -> Result:
        """Ask a rule, and look at the answer where the rule is the user's own.

        Raises:
            RunError: the answer is not what the axis needs.
        """
        answer = rule(inputs)
        if self.is_own(kind) and (wrong := self._what_is_wrong(inputs, answer)):
            raise RunError(f"{self.key}={kind} {wrong}")
        return answer

    def check(self, config: Config) -> frozenset[str]:
        """Try a rule of the user's own as the learner will; returns the names of its metrics.

        Raises:
            UserError: it cannot be imported, it raises, or its answer is not what the axis needs.
        """
        if not self.is_own(config.kind):
            check_arguments(
                f"algorithm.{self.name}.args", config.args, self.rules[config.kind], config.kind
            )
            return frozenset()
        names: set[str] = set()
        for of, make in self.cases.items():
            inputs = make()
            try:
                rule = self.rule(config)
                answer = rule(inputs)
                wrong = self._what_is_wrong(inputs, answer)
                if wrong is None:
                    learnt = self.end_step(rule, inputs) if self.end_step else {}
                    wrong = number_problem(learnt) or _name_problem(learnt)
                    rule.load_state_dict(json.loads(json.dumps(rule.state_dict())))
            except UserError:
                raise
            except Exception as error:  # a rule is a program of the user's; it may raise anything
                wrong = f"raised {type(error).__name__}: {error}. It is called as {self._usage}"
            if wrong is not None:
                raise UserError(f"{self.key}={config.kind}, tried on {of}, {wrong}")
            names |= answer.metrics.keys() | learnt.keys()
        return frozenset(names)

    @property
    def _usage(self) -> str:
        config = f"{self.name.capitalize()}Config"
        return f"function({self.inputs.__name__}, {config}, **args) -> {self.result.__name__}"

    def _what_is_wrong(self, inputs: Inputs, answer: object) -> str | None:
        if not isinstance(answer, self.result):
            where = f"{self.result.__module__}.{self.result.__name__}"
            return f"returned a {type(answer).__name__}: return a {where}"
        return self.problem(inputs, answer) or _name_problem(answer.metrics)


def token_cases(make: Callable[[list[int]], Inputs]) -> dict[str, Callable[[], Inputs]]:
    """Cases for an axis that sees tokens: some completions, and one without a token."""
    return {
        f"completions of {lengths} tokens": functools.partial(make, lengths)
        for lengths in ([3, 1], [0])
    }


def tensor_problem(name: str, value: object, like: Tensor, *, boolean: bool = False) -> str | None:
    """What is wrong with a tensor that should have a value for each of `like`; None if nothing."""
    kind = "true or false" if boolean else "finite value"
    wrong = f"its {name} must hold one {kind} each, of shape {list(like.shape)}"
    if not isinstance(value, Tensor) or value.shape != like.shape:
        return wrong
    right = value.dtype == torch.bool if boolean else bool(value.isfinite().all())
    return None if right else wrong


def number_problem(metrics: Mapping[str, object]) -> str | None:
    """What is wrong with metrics of a whole batch, one number each; None if nothing."""
    for name, value in metrics.items():
        if not isinstance(value, int | float) or not math.isfinite(value):
            return f"returned {value!r} as metric {name!r}: return a finite number"
    return None


def token_metric_problem(metrics: Mapping[str, object], like_N: Tensor) -> str | None:
    """What is wrong with metrics of tokens, one value each; None if nothing."""
    for name, value in metrics.items():
        if wrong := tensor_problem(f"metric {name!r}", value, like_N):
            return wrong
    return None


def _name_problem(metrics: Mapping[str, object]) -> str | None:
    for name in metrics:
        if not isinstance(name, str) or not _METRIC_NAME.fullmatch(name):
            return f"returned a metric called {name!r}: call it like advantage/median"
        if name in METRICS:
            return f"returned a metric called {name!r}, which is one of ours: call it otherwise"
    return None


_METRIC_NAME = re.compile(r"[A-Za-z0-9_.-]+(/[A-Za-z0-9_.-]+)+")
