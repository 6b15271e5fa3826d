"""`grpo-lambda replay RUN --episode GROUP/INDEX` plays an episode of the log again.

An environment is begun with the same task and seed, and is told what the policy said, turn after
turn. A command is run with the same task, and its calls are answered with what the policy said. So
a difference is the environment's or the command's: it has changed, or does not repeat itself.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.record.trajectory_log import read_log
from deploy.inspector.episode_parting import Parting
from deploy.inspector.replay import run_config
from deploy.inspector.replay_command import by_command
from deploy.inspector.replay_environment import in_environment
from deploy.models.resolve import tokenizer_here


@dataclass(frozen=True)
class EpisodeReplay:
    """An episode played again, compared with the log."""

    group: int
    index: int
    played_by: str
    """The environment's name, or the command."""
    command: bool
    turns: int
    """Turns of the episode in the log."""
    parting: Parting | None


def replay_episode(run: Path, episode: str) -> EpisodeReplay:
    """Play an episode of the run directory `run` again.

    Args:
        episode: GROUP/INDEX, the group's number and the place of the completion in it.

    Raises:
        UserError: the run has no environment or no such episode, or the environment cannot be used.
        RunError: the environment's process does not come up.
    """
    config = run_config(run)
    if not config.environment.playing:
        raise UserError(
            f"{run}: the run named no environment (environment.name) and no command "
            "(environment.command), so nothing can be played again"
        )
    row = find_episode(run, *_numbers(episode))
    tokenizer = tokenizer_here(config.model.path, config.model.trust_remote_code)
    if tokenizer is None:
        raise UserError(
            f"the tokenizer of model.path={config.model.path} is not on this machine: fetch the "
            "model, or play the episode where the run was"
        )
    command = config.environment.command
    play = in_environment if command is None else by_command
    turns, parting = asyncio.run(play(config, row, tokenizer))
    name = str(config.environment.name) if command is None else " ".join(command)
    place = (row["group_id"], row["completion_index"])
    return EpisodeReplay(*place, name, command is not None, turns, parting)


def find_episode(run: Path, group: int, index: int) -> dict[str, Any]:
    """The row of the trajectory log of completion `index` of a group.

    Raises: `UserError` when it is not there.
    """
    groups: list[int] = []
    for batch in read_log(run / "trajectories"):
        groups.append(batch.column("group_id")[0].as_py())
        if groups[-1] != group:
            continue
        indices: list[int] = batch.column("completion_index").to_pylist()
        if index in indices:
            row: dict[str, Any] = batch.slice(indices.index(index), 1).to_pylist()[0]
            return row
        raise UserError(
            f"--episode {group}/{index}: group {group} of {run} has the completions "
            f"{', '.join(map(str, sorted(indices)))}"
        )
    there = f"{len(groups)} from {min(groups)} to {max(groups)}" if groups else "no groups"
    raise UserError(f"--episode {group}/{index}: the log of {run} has {there}, and not this one")


def _numbers(episode: str) -> tuple[int, int]:
    group, _, index = episode.partition("/")
    if not (group.isdecimal() and index.isdecimal()):
        raise UserError(
            f"--episode {episode}: give the group's number and the completion's place in it, such "
            "as 12/3"
        )
    return int(group), int(index)


def describe_episode(found: EpisodeReplay) -> str:
    """The text that `grpo-lambda replay --episode` prints."""
    turns = f"{found.turns} turn{'' if found.turns == 1 else 's'}"
    lines = [f"episode {found.group}/{found.index} of {found.played_by}, {turns}, played again"]
    parting = found.parting
    if parting is None:
        same = "calls and rewards" if found.command else "observations, rewards and states"
        return "\n".join([*lines, f"all {same} are the same"])
    where = f"behind turn {parting.turn}" if parting.turn else "at the beginning"
    changed = "the command has changed since, or does not repeat itself for a task"
    if not found.command:
        changed = (
            "the environment has changed since, or does not repeat itself for a task and a seed"
        )
    return "\n".join(
        [
            *lines,
            f"it differs from the log {where}: the {parting.what}",
            f"  in the log    {parting.recorded}",
            f"  played again  {parting.replayed}",
            changed,
        ]
    )
