"""What `grpo-lambda credit` leaves in a run, without having sampled anything."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa

from deploy.credit import report
from deploy.credit.completions import chosen, policy_version
from deploy.credit.files import measured_path
from deploy.credit.gradient import Directions
from deploy.credit.measured import Measured
from deploy.eval.metrics import Estimate

Branches = Mapping[int, Sequence[float]]
"""By tokens before each branch, the rewards of its continuations."""


def write_measured(
    run: Path, step: int, group: pa.RecordBatch, branches: Mapping[int, Branches]
) -> list[Measured]:
    """Write a measure of some completions of a group, by their index; returns it."""
    sampled = [
        each for each in chosen([group], policy_version([group]), 99) if each.index in branches
    ]
    measured = [
        Measured(
            tuple(branches[each.index]),
            len(each.token_ids),
            each.reward,
            tuple(tuple(rewards) for rewards in branches[each.index].values()),
            (0.0, 1.0),
        )
        for each in sampled
    ]
    nothing = Estimate(math.nan, math.nan, math.nan)
    completions = [(each, ["x"] * len(each.token_ids)) for each in sampled]
    ways = {"this run": Directions(nothing, nothing, "nobody asked")}
    folder = measured_path(run, step)
    folder.mkdir(parents=True)
    report.write(folder, report.of(completions, measured, {"this run": {}}, ways))
    return measured
