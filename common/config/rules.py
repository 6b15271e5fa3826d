"""Keys that name a rule: one of ours, or a user's own by its import path.

Such a key is `Annotated[str, RuleNames(...)]`, so the names stand beside the field. They are the
names of the table that the learner looks the rule up in; a test compares the two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any, get_type_hints

from common.errors import UserError, nearest

if TYPE_CHECKING:
    from common.config.algorithm import AlgorithmConfig


class RuleNames:
    """Names that a key takes besides `package.module:name`."""

    def __init__(self, *names: str) -> None:
        self.names = names


def rule_names(hint: Any) -> tuple[str, ...]:
    """Names in a type hint with extras; () where it has none."""
    found = (each for each in getattr(hint, "__metadata__", ()) if isinstance(each, RuleNames))
    return next((each.names for each in found), ())


def names_own_rule(config: AlgorithmConfig) -> bool:
    """Whether an axis takes a rule of the user's own, by its import path."""
    return any(":" in getattr(config, axis.name).kind for axis in fields(config))


def check_rule_names(config: AlgorithmConfig) -> None:
    """Raise `UserError` for a `kind` that is neither a known name nor an import path."""
    for axis in fields(config):
        section = getattr(config, axis.name)
        known = rule_names(get_type_hints(type(section), include_extras=True)["kind"])
        check_rule_name(f"algorithm.{axis.name}.kind", section.kind, known)


def check_rule_name(key: str, kind: str, known: Sequence[str]) -> None:
    """Raise `UserError` unless `kind` is one of `known` or an import path."""
    if kind not in known and ":" not in kind:
        raise UserError(
            f"{key}={kind} is not known{nearest(kind, known)}: use one of {', '.join(known)}, or "
            "your own as package.module:name"
        )
