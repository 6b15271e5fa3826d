"""How many rows the learner computes for the groups of a run, with and without tries.

    python tests/bench/trie_rows.py runs/NAME

A row is a token that goes through the model. The groups of the log are packed as the learner packs
them: all completions, and those alone that have a gradient under the run's recipe.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from common.config.load import load_config
from common.record.parts import learnt
from common.record.trajectory_log import read_log
from learner.algorithm.recipe import Recipe
from learner.policy.packing import plan_packing
from learner.policy.step_batch import StepBatch


def rows(batch: StepBatch, chosen_B: npt.NDArray[np.bool_], budget: int) -> int:
    """Rows of the micro-batches of one rank."""
    plan = plan_packing(
        batch, chosen_B, ranks=1, budget=budget, share_prefix=True, pairs_per_token=1e9
    )
    return sum(segment.tokens for members in plan.microbatches[0] for segment in members)


def main(run: Path) -> None:
    config = load_config([run / "config.yaml"], [], resolved=True)
    recipe = Recipe(
        config.algorithm, config.correction_kind, config.generator.max_completion_tokens
    )
    groups = [learnt(group) for group in read_log(run / "trajectories")]
    size, budget = config.groups_per_step, config.batch.tokens_per_microbatch
    found = dict.fromkeys(("all completions", "those with a gradient"), (0, 0))
    sampled = 0
    for first in range(0, len(groups) - size + 1, size):
        batch = StepBatch.from_record_batches(groups[first : first + size])
        sampled += int(batch.sampled_lengths_B.sum())
        trained_B = recipe.estimate(batch.rewarded("the verifier")).trained_B.numpy()
        for name, chosen_B in zip(found, (np.ones_like(trained_B), trained_B), strict=True):
            tries, plain = (rows(each, chosen_B, budget) for each in (batch, without_tries(batch)))
            found[name] = (found[name][0] + tries, found[name][1] + plain)
    print(f"{len(groups)} groups, {sampled:,} tokens sampled")
    for name, (tries, plain) in found.items():
        print(f"{name}: {tries:,} rows with tries, {plain:,} without ({tries / plain:.0%})")


def without_tries(batch: StepBatch) -> StepBatch:
    """The same step, in which every completion has all of its tokens itself."""
    return replace(batch, trees=None)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
