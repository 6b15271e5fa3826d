"""What can be known of an environment before a run: its tools, and whether it repeats itself."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

from actors.environments.base import Reply
from actors.environments.host import EnvironmentFailure, EnvironmentHost
from common.config.environment import EnvironmentConfig
from common.errors import UserError

_SEED = 20_000
_REPLIES = ("", "1", "yes", "I do not know.")
"""What is said in the trial. Nothing that would win: the environment only has to stay itself."""


@dataclass(frozen=True)
class Inspected:
    """What was found."""

    tools: list[dict[str, Any]]
    """JSON schemas of the environment's tools."""
    notes: list[str]
    """Sentences for people; none where there is nothing to say."""
    speaks_first: bool = False
    """Whether an episode begins with something to read."""
    reset_s: float = 0.0
    """Seconds in which the environment began an episode."""
    turn_s: float = 0.0
    """Mean seconds of an answer to a reply."""


@dataclass
class _Trial:
    """What an episode of scripted replies showed, up to its end."""

    seen: list[object]
    reset_s: float
    turns_s: list[float] = field(default_factory=list)


def environment_tools(config: EnvironmentConfig) -> list[dict[str, Any]]:
    """Give the tools of the environment; none where there is no environment, or a command.

    Raises: as `inspect_environment`.
    """
    return [] if config.name is None else _apart(_inspected(config, None)).tools


def inspect_environment(config: EnvironmentConfig, task: Mapping[str, Any]) -> Inspected:
    """Start the environment, and play two short episodes of one task and seed.

    Of a command it is looked for, and the walls are tried: without a policy it has nothing to do.

    Raises:
        UserError: it cannot be used, or cannot begin an episode of `task`.
        RunError: its process does not come up.
    """
    if config.command is not None:
        return _apart(_command_tried(config))
    return Inspected([], []) if config.name is None else _apart(_inspected(config, task))


def _apart(inspection: Coroutine[Any, Any, Inspected]) -> Inspected:
    """Wait for it in a thread with a loop of its own: the caller may be inside of one."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, inspection).result()


async def _command_tried(config: EnvironmentConfig) -> Inspected:
    from actors.endpoint.command import Command

    command = Command(config)
    await command.check()
    return Inspected([], [f"command: {' '.join(command.words)}"])


async def _inspected(config: EnvironmentConfig, task: Mapping[str, Any] | None) -> Inspected:
    host = EnvironmentHost(replace(config, workers=1))
    try:
        await host.start()
        if task is None:
            return Inspected(host.tools, [])
        once, again = [await _trial(host, key, task) for key in ("once", "again")]
        turns_s = once.turns_s + again.turns_s
        return Inspected(
            host.tools,
            _differences(config, once.seen, again.seen),
            bool(once.seen[0]),
            again.reset_s,  # the first one may import what the others share
            sum(turns_s) / max(1, len(turns_s)),
        )
    finally:
        await host.shutdown()


async def _trial(host: EnvironmentHost, key: str, task: Mapping[str, Any]) -> _Trial:
    """Play an episode. Raises `UserError` when it cannot begin."""
    first = await host.reset(key, task, _SEED)
    if isinstance(first, EnvironmentFailure):
        raise UserError(
            f"environment.name={host.name} cannot begin an episode of the first task: "
            f"{first.reason}\n{first.traceback}".rstrip()
        )
    trial = _Trial([first.text], first.seconds)
    seen = trial.seen
    for reply in _REPLIES:
        answer = await host.step(key, Reply(reply))
        trial.turns_s.append(answer.seconds)
        if isinstance(answer, EnvironmentFailure):
            seen.append(answer.kind)
            break
        seen.append((answer.text, answer.reward, answer.done, answer.state))
        if answer.done:
            break
    host.close(key)
    return trial


def _differences(config: EnvironmentConfig, once: list[object], again: list[object]) -> list[str]:
    if once == again:
        return []
    turn = next(
        (turn for turn, (a, b) in enumerate(zip(once, again, strict=False)) if a != b),
        min(len(once), len(again)),
    )
    return [
        f"environment.name={config.name} is not the same twice: two episodes of one task and seed "
        f"differed {'at their beginning' if turn == 0 else f'after turn {turn}'}. A run that is "
        "resumed does not repeat itself, and episodes of a group have different luck"
    ]
