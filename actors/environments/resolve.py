"""From `environment.name` to something that makes environments."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from actors.environments.base import Environment
from actors.environments.tools import FactoryEnvironment
from common.config.names import check_name, import_named, misfit
from common.errors import UserError

BUILTIN = {
    "calculator": "actors.environments.calculator:Calculator",
    "guess": "actors.environments.guess:Guess",
    "mcp": "actors.environments.mcp_tools:McpTools",
    "python": "actors.environments.python_tool:Python",
}
"""Environments that come with this package."""


@dataclass(frozen=True)
class Factory:
    """Makes environments of one kind."""

    kind: Callable[..., Any]
    args: Mapping[str, Any]

    @property
    def programs(self) -> str:
        """The module whose programs the environment runs; empty for most."""
        return str(getattr(self.kind, "programs", ""))

    def make(self) -> Environment:
        """A new environment; raises whatever its constructor raises."""
        made = self.kind(**self.args)
        return made if isinstance(made, Environment) else FactoryEnvironment(made)


def resolve(name: str, args: Mapping[str, Any]) -> Factory:
    """What makes one environment an episode.

    An `Environment` is taken as it is. Any other class, or a function, is taken to make an object
    in the style of TRL's `environment_factory`.

    Args:
        name: a built-in environment, or `package.module:Class`.
        args: keyword arguments of the class.

    Raises:
        UserError: it cannot be imported, is no class, has a method with a wrong signature, or
            does not take `args`.
    """
    check_name("environment.name", name, tuple(BUILTIN))
    found = import_named("environment.name", BUILTIN.get(name, name), tuple(BUILTIN))
    _check(name, "it", found, (), args, "environment.args")
    if inspect.isclass(found) and issubclass(found, Environment):
        for method, given in (("reset", (None, {}, 0)), ("step", (None, ""))):
            _check(name, f"its {method}", getattr(found, method), given, {}, "the call")
        if found.step is Environment.step:
            raise UserError(f"environment.name={name} has no method step(reply)")
    elif inspect.isclass(found) and not callable(getattr(found, "reset", None)):
        raise UserError(
            f"environment.name={name} has no method reset: derive the class from "
            "actors.environments.base.Environment"
        )
    return Factory(found, args)


def _check(
    name: str,
    what: str,
    function: Callable[..., Any],
    head: tuple[Any, ...],
    args: Mapping[str, Any],
    key: str,
) -> None:
    if (wrong := misfit(function, head, args)) is not None:
        error, signature = wrong
        raise UserError(
            f"environment.name={name}: {what} does not take {key}: {error}; it takes {signature}"
        ) from error
