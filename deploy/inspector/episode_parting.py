"""Where an episode of the log and the same one played again part, and what both are played from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from common.config.sections import Config
from common.record.schema import ERROR, TIMEOUT
from common.trajectory import GroupRequest, group_seed

Row = Mapping[str, Any]
FAILED = (ERROR, TIMEOUT)
"""Verdicts of an environment that failed."""


@dataclass(frozen=True)
class Parting:
    """Where the episode of the log and the one played again first differ."""

    turn: int
    """Turns that the policy had taken; 0: at the beginning."""
    what: str
    recorded: str
    replayed: str


def request_of(row: Row, config: Config) -> GroupRequest:
    """The request that an episode of the log was the answer to, as far as it is played by it."""
    return GroupRequest(
        group_id=row["group_id"],
        ticket=row["ticket"],
        prompt_id=row["prompt_id"],
        epoch=row["epoch"],
        question=row["question"],
        prompt_text=row["prompt_text"],
        prompt_ids=row["prompt_ids"],
        reference=row["reference"],
        num_completions=1,
        max_tokens=config.generator.max_completion_tokens,
        temperature=config.generator.temperature,
        dispatch_version=row["dispatch_version"],
        dispatched_s=row["dispatched_s"],
        seed=group_seed(config.sampling_seed, row["ticket"]),
    )


def end_of(finish_reason: str, verdict: str, reason: str) -> str:
    """How an episode ended, in words."""
    return f"{finish_reason}, {verdict or 'no reward'}" + (f" ({reason})" if reason else "")


def same_reward(recorded: float | None, replayed: float | None) -> bool:
    """Whether a reward is the one on record."""
    if recorded is None or replayed is None:
        return recorded is replayed
    return recorded == float(np.float32(replayed))  # as the log has it
