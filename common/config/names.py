"""Keys that name a rule or a class: one of ours, or a user's own by its import path.

Such a key is `Annotated[str, Names(...)]`, so the names stand beside the field. They are the names
of the table that the learner looks in; a test compares the two.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any, get_type_hints

from common.errors import UserError, nearest

if TYPE_CHECKING:
    from common.config.algorithm import AlgorithmConfig


class Names:
    """Names that a key takes besides `package.module:name`."""

    def __init__(self, *names: str) -> None:
        self.names = names


def names_in(hint: Any) -> tuple[str, ...]:
    """Names in a type hint with extras; () where it has none."""
    found = (each for each in getattr(hint, "__metadata__", ()) if isinstance(each, Names))
    return next((each.names for each in found), ())


def names_own_rule(config: AlgorithmConfig) -> bool:
    """Whether an axis takes a rule of the user's own, by its import path."""
    return any(":" in getattr(config, axis.name).kind for axis in fields(config))


def check_names(section: Any) -> None:
    """Raise `UserError` for a value that is neither a known name nor an import path."""
    for key, value, known in _named(section, ""):
        check_name(key, value, known)


def check_name(key: str, value: str, known: Sequence[str]) -> None:
    """Raise `UserError` unless `value` is one of `known` or an import path."""
    if value not in known and ":" not in value:
        raise UserError(
            f"{key}={value} is not known{nearest(value, known)}: use one of {', '.join(known)}, or "
            "your own as package.module:name"
        )


@functools.cache
def import_named(key: str, path: str, known: Sequence[str]) -> Any:
    """Import the function or class that `path`, package.module:name, names.

    Args:
        known: names that the key takes besides.

    Raises:
        UserError: it is no import path, cannot be imported, or is neither function nor class.
    """
    check_name(key, path, known)
    module, _, name = path.partition(":")
    near = ""
    try:
        imported = importlib.import_module(module)
        near = nearest(name, [each for each in vars(imported) if not each.startswith("_")])
        found = getattr(imported, name)
    except Exception as error:  # a module is a program of the user's; it may raise anything
        raise UserError(
            f"{key}={path} cannot be imported: {type(error).__name__}: {error}{near}. Use one of "
            f"{', '.join(known)}, or package.module:name, importable from the directory the run "
            "was started in or from PYTHONPATH"
        ) from error
    if not callable(found):
        raise UserError(
            f"{key}={path} is of type {type(found).__name__}, neither a function nor a class"
        )
    return found


def misfit(
    function: Callable[..., Any], head: Sequence[object], args: Mapping[str, Any]
) -> tuple[TypeError, inspect.Signature] | None:
    """Why a function cannot be called with these arguments, and its signature.

    None where it can be, and for a builtin without a signature, which can only be tried.
    """
    try:
        signature = inspect.signature(function)
    except ValueError:
        return None
    try:
        signature.bind(*head, **args)
    except TypeError as error:
        return error, signature
    return None


def _named(section: Any, prefix: str) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """Key, value and known names of every such key in a dataclass, at any depth."""
    hints = get_type_hints(type(section), include_extras=True)
    for field in fields(section):
        key, value = f"{prefix}{field.name}", getattr(section, field.name)
        if known := names_in(hints[field.name]):
            yield key, value, known
        elif is_dataclass(value):
            yield from _named(value, f"{key}.")
