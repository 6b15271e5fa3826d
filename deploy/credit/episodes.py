"""Branches of episodes: how an environment is brought to one, and whether it can be.

A branch at t goes on from the first t tokens of an episode on record. A new environment is begun
with the same task and seed, and told what the policy said in its turns up to there. What it says to
them has to be what is on record: else the branch would be of another episode. Then the policy goes
on, in the middle of a turn or at its beginning, and the episode is played to its end.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

from actors.generation.episodes import environment_seed
from common.config.sections import Config
from common.errors import UserError
from common.trajectory import Begun
from deploy.inspector.episode_parting import Row, request_of
from deploy.inspector.replay_environment import all_in_environment
from deploy.models.resolve import tokenizer_here


def begun_at(row: Row, point: int, config: Config) -> Begun:
    """The first `point` tokens of an episode of the log, as a beginning to go on from."""
    turns = []
    for turn in row["turns"]:
        begin, end = turn["begin"], turn["end"]
        if begin > point:
            break
        whole = end <= point
        turns.append((begin, min(end, point), turn["finish"] if whole else ""))
    return Begun(
        tuple(row["token_ids"][:point]), tuple(turns), environment_seed(request_of(row, config))
    )


def check_repeats(config: Config, rows: Sequence[Row], policy: Path) -> None:
    """Play the episodes of rows again with what the policy said, before anything is sampled.

    Args:
        policy: folder with the policy's tokenizer.

    Raises:
        UserError: an observation, a reward or the end is not that of the log; or the environment
            cannot be used. RunError: its process does not come up.
    """
    tokenizer = tokenizer_here(str(policy), config.model.trust_remote_code)
    if tokenizer is None:
        raise UserError(f"{policy} has no tokenizer: remove that folder, and it is made again")
    found = asyncio.run(all_in_environment(config, rows, tokenizer))
    parted = [(row, parting) for row, (_, parting) in zip(rows, found, strict=True) if parting]
    if not parted:
        return
    row, first = parted[0]
    where = f"behind turn {first.turn}" if first.turn else "at the beginning"
    raise UserError(
        f"environment.name={config.environment.name} does not repeat itself, so it cannot be "
        f"brought to a branch: {len(parted)} of {len(rows)} episodes part from the log when they "
        f"are played again. Episode {row['group_id']}/{row['completion_index']} does {where}: its "
        f"{first.what} is {first.replayed}, and {first.recorded} in the log. If the environment "
        "has changed since the run, put that one back; else have it draw from the seed that reset "
        "is given, and look at no clock"
    )
