"""Episodes that have ended in every way there is, as rows of the log."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from actors.generation.episodes import Episode
from actors.generation.rows import rollout_batch
from actors.verifiers.judge import Judge, Played
from actors.verifiers.worker import with_verdicts
from common.config.sections import VerifierConfig, VerifierSpec
from common.record.turns import turn
from common.trajectory import GroupRequest

ENDS = (
    ("stop", "pass", 1.0),
    ("stop", "fail", 0.0),
    ("stop", "error", None),
    ("turns", "pass", 0.5),
    ("context", "fail", 0.0),
    ("length", "pass", 0.25),
    ("stop", "timeout", None),
    ("reset", "error", None),
)
"""Finish reason (`reset`: it did not begin), verdict and reward."""


def ended(ends: Sequence[tuple[str, str, float | None]] = ENDS, group: int = 0) -> pa.RecordBatch:
    """A judged group of one episode for each end: two turns with an observation between them. What
    is in an episode follows from its end."""
    request = GroupRequest(group, group, "p", 0, "?", "?", [1, 2], "{}", len(ends), 16, 1.0, 0, 0.0)
    kinds = [*ENDS, *(end for end in ends if end not in ENDS)]
    played = {index: _episode(kinds.index(end), *end) for index, end in enumerate(ends)}
    batch = rollout_batch(request, played, [""] * len(ends), "g")
    judge = Judge(VerifierConfig(rules=[VerifierSpec(name="environment")]))
    said = [
        Played(each.environment_verdict, each.environment_reason, each.environment_reward)
        for each in played.values()
    ]
    nobody = [""] * len(ends)
    return with_verdicts(
        batch, ["environment"], judge.judge(nobody, ["{}"] * len(ends), played=said)
    )


def _episode(index: int, finish: str, verdict: str, reward: float | None) -> Episode:
    told: dict[str, Any] = {
        "environment_verdict": verdict,
        "environment_reason": "" if reward is not None else "step: KeyError: 'shelf'",
        "environment_reward": reward,
    }
    if finish == "reset":
        return Episode([], [], [], "stop", turns=(turn(0, 0, "stop"),), **told)
    first, given, last = 2 + index % 3, 3, 1 + index % 2
    begin = first + given
    turns = (turn(0, first, "stop"), turn(begin, begin + last, "stop", reward))
    logprobs = [-0.5] * first + [math.nan] * given + [-0.25] * last
    tokens = [5 + (7 * index + place) % 20 for place in range(len(logprobs))]
    return Episode(tokens, logprobs, [0] * len(tokens), finish, turns=turns, **told)
