"""Environments whose methods are tools, and the schemas of tools.

A tool is a public method with typed parameters and a docstring that describes each of them:

    class Calculator(ToolEnvironment):
        def multiply(self, a: int, b: int) -> int:
            \"\"\"Multiply two whole numbers.

            Args:
                a: The first number.
                b: The second number.
            \"\"\"
            return a * b

        def reward(self, reply: str) -> float:
            return float(reply.strip() == self.task["answer"])

transformers makes the schema that the model is told. Arguments are checked against it before a call
is made. A reply without a call ends the episode, and `reward` judges it.
"""

from __future__ import annotations

import asyncio
import inspect
import json
from collections.abc import Awaitable, Callable, Iterable, Mapping
from functools import cache
from typing import Any

import jsonschema

from actors.environments.base import Environment, Reply, Step, ToolCall, ToolResult

MAX_CALLS = 8
"""Most calls of one reply that are made."""
OF_THE_CALL = (ValueError, ArithmeticError, LookupError)
"""What a tool raises for arguments that make no sense. The policy is told, and the episode goes on.
Anything else is a failure of the environment, and ends the episode without a reward."""

Schema = Mapping[str, Any]


class ToolError(TypeError):
    """A method that cannot be a tool; the message says which and why."""


class ToolEnvironment(Environment):
    """An environment that offers its public methods as tools."""

    task: Mapping[str, Any]
    """The row of the data set, from `reset` on."""
    schemas: Mapping[str, Schema]
    """Schemas of the tools by their names. Set before `reset` is called."""

    def reset(self, task: Mapping[str, Any], seed: int) -> Any:
        self.task = task
        return ""

    def step(self, reply: str) -> Step:
        """Make the calls of the reply, one after the other; without any the episode is over."""
        calls = self.calls(reply)
        if not calls:
            return Step(reward=settled(self.reward(reply)), done=True)
        results = [self._result(call) for call in calls[:MAX_CALLS]]
        results += [
            ToolResult(call.name, f"error: only {MAX_CALLS} calls of a reply are made", True)
            for call in calls[MAX_CALLS : 2 * MAX_CALLS]
        ]
        return Step("\n".join(result.text for result in results), results=tuple(results))

    def calls(self, reply: str) -> list[ToolCall]:
        """Tool calls of a reply. Those that the model's parser found, unless you find others."""
        return list(reply.calls) if isinstance(reply, Reply) else []

    def tools(self) -> Any:
        """Schemas of the public methods. Raises `ToolError` for one that cannot be a tool."""
        return [schema_of(method) for method in self._methods().values()]

    def call(self, name: str, arguments: Mapping[str, Any]) -> Any:
        """Make a call whose arguments fit the schema; returns what the policy is told."""
        return self._methods()[name](**arguments)

    def _methods(self) -> dict[str, Callable[..., Any]]:
        return methods_of(self, besides=dir(ToolEnvironment))

    def _result(self, call: ToolCall) -> ToolResult:
        problem = call.problem or self._misfit(call)
        if problem:
            return ToolResult(call.name, f"error: {problem}", failed=True)
        try:
            return ToolResult(call.name, as_text(settled(self.call(call.name, call.arguments))))
        except OF_THE_CALL as error:
            return ToolResult(call.name, f"error: {type(error).__name__}: {error}", failed=True)

    def _misfit(self, call: ToolCall) -> str:
        """Why the call does not fit the tool's schema; empty where it does."""
        if call.name not in self.schemas:
            known = ", ".join(self.schemas) or "none"
            return f"there is no tool {call.name!r}; there are: {known}"
        parameters = self.schemas[call.name]["function"].get("parameters", {})
        unknown = set(call.arguments) - set(parameters.get("properties", ()))
        if unknown and not parameters.get("additionalProperties", False):
            return f"{call.name} takes no {', '.join(sorted(unknown))}"
        wrong = jsonschema.Draft202012Validator(parameters).iter_errors(dict(call.arguments))
        return "; ".join(f"{call.name}: {error.message}" for error in wrong)[:500]


class FactoryEnvironment(ToolEnvironment):
    """An object in the style of TRL's `environment_factory`, as an environment.

    Such an object has `reset(**row)`, public methods that are tools, and perhaps `get_reward()`.
    """

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def reset(self, task: Mapping[str, Any], seed: int) -> Any:
        return self._inner.reset(**task)

    def reward(self, reply: str) -> Any:
        return getattr(self._inner, "get_reward", lambda: None)()

    def close(self) -> Any:
        return getattr(self._inner, "close", lambda: None)()

    def _methods(self) -> dict[str, Callable[..., Any]]:
        return methods_of(self._inner, besides=("reset", "get_reward", "close"))


@cache
def _runner() -> asyncio.Runner:
    return asyncio.Runner()


def settled(value: Any) -> Any:
    """What a method gave, once it is there: what can be awaited is, by this process's one loop.

    No loop runs while methods are called, so they may start one of their own.
    """
    return _runner().run(_awaited(value)) if inspect.isawaitable(value) else value


async def _awaited(value: Awaitable[Any]) -> Any:
    return await value


def as_text(value: Any) -> str:
    """What a tool returned, as the policy reads it: text as it is, else JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def methods_of(instance: object, besides: Iterable[str]) -> dict[str, Callable[..., Any]]:
    """The public methods of an object by name, but for `besides`: its tools."""
    kind, others = type(instance), {*besides}
    names = [name for name in dir(kind) if not name.startswith("_") and name not in others]
    routines = [name for name in names if inspect.isroutine(getattr(kind, name))]
    return {name: getattr(instance, name) for name in routines}


def schema_of(method: Callable[..., Any]) -> Schema:
    """The JSON schema of a tool, by its types and its docstring.

    Raises: `ToolError` where a parameter has no type or no description, or takes any number of
    values.
    """
    from transformers.utils import get_json_schema  # a second to import

    name = method.__qualname__
    parameters = inspect.signature(method).parameters.values()
    if any(each.kind in (each.VAR_POSITIONAL, each.VAR_KEYWORD) for each in parameters):
        raise ToolError(f"tool {name}: name its parameters instead of * or **")
    if any(each.kind == each.POSITIONAL_ONLY for each in parameters):
        raise ToolError(f"tool {name}: its parameters have to be given by name")
    try:
        return dict(get_json_schema(method))
    except Exception as error:  # transformers has several, with only Exception in common
        raise ToolError(
            f"tool {name}: {error} A tool has typed parameters, and a docstring with a line for "
            "each of them under `Args:`. A method that is no tool begins with an underscore"
        ) from error
