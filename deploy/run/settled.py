"""What a configuration leaves to the data: where they come from, and which rule judges.

A run writes down what was settled, so that going on, replay and evaluation ask nobody again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from actors.data.fitting import fitting_rule
from actors.data.sources import first_rows
from common.config.data import DataConfig, DataSource
from common.config.sections import Config, VerifierSpec
from common.errors import UserError

_LOOKED_AT = 200
"""Rows at the beginning of a data set by which its rule is chosen."""

Notify = Callable[[str], None]


def settled(config: Config, notify: Notify) -> Config:
    """`config` with every data set's source and with rules; what was chosen is said.

    Raises:
        UserError: the data cannot be read, or no built-in rule fits them.
    """
    rules = config.verifier.rules or _fitting_rules(config.data, notify)
    return replace(
        config,
        data=_with_kinds(config.data),
        verifier=replace(config.verifier, rules=rules),
    )


def _with_kinds(data: DataConfig) -> DataConfig:
    if data.sources:
        return replace(data, sources=[replace(one, source=one.kind) for one in data.sources])
    return replace(data, source=data.kind)


def _fitting_rules(data: DataConfig, notify: Notify) -> list[VerifierSpec]:
    """One rule for each data set; data sets that one rule fits share it."""
    judged: dict[str, list[str]] = {}
    for one in data.each:
        judged.setdefault(_rule_of(one, notify), []).append(one.name)
    if len(judged) == 1:
        return [VerifierSpec(name=name) for name in judged]
    return [VerifierSpec(name=name, sources=names) for name, names in judged.items()]


def _rule_of(one: DataSource, notify: Notify) -> str:
    if one.kind == "reasoning_gym":
        return "reasoning_gym"
    rows = first_rows(one, _LOOKED_AT)
    name = fitting_rule(rows)
    if name is None:
        raise UserError(
            f"{one.path} ({rows[0].schema}): no built-in rule fits its answers, which are neither "
            "short, nor letters, nor tests, or name options that the question does not show. Name "
            "a rule with verifier.rules, such as a function of your own, or the column with the "
            "answer with data.answer_column"
        )
    notify(f"{one.path} ({rows[0].schema}) is judged by {name}, which fits its first rows")
    return name
