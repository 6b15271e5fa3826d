"""Made-up data for the rows: step batches and record batches of given lengths."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from actors.engine import Completion
from actors.generator import rollout_batch
from common.schema import trajectory_schema
from common.trajectory import GroupRequest
from learner.packing import StepBatch


def verified_group(
    group_id: int, prompt: int, lengths: Sequence[int], vocabulary: int = 1000, seed: int = 0
) -> pa.RecordBatch:
    """A group under `trajectory_schema(["rule"])`, random tokens and rewards of 0 and 1."""
    draw = np.random.default_rng([seed, group_id])
    request = GroupRequest(
        group_id=group_id,
        prompt_id=f"p{group_id}",
        epoch=0,
        prompt_text="?",
        prompt_ids=draw.integers(3, vocabulary, prompt).tolist(),
        reference="{}",
        num_completions=len(lengths),
        max_tokens=max(lengths),
        temperature=1.0,
        dispatch_version=0,
        dispatched_s=0.0,
    )
    completions = {
        index: Completion(
            draw.integers(3, vocabulary, length).tolist(),
            draw.uniform(-2, 0, length).tolist(),
            [0] * int(length),
            "stop",
        )
        for index, length in enumerate(lengths)
    }
    rollout = rollout_batch(request, completions, [""] * len(lengths), "g")
    rewards = pa.array([float(i % 2) for i in range(len(lengths))], pa.float32())
    kinds = pa.array(["scored"] * len(lengths))
    return pa.RecordBatch.from_arrays(
        [*rollout.columns, rewards, kinds, rewards, rewards], schema=trajectory_schema(["rule"])
    )


def step_batch(shapes: Sequence[tuple[int, Sequence[int]]]) -> StepBatch:
    """A learner step of (prompt length, completion lengths) groups."""
    return StepBatch.from_record_batches(
        [verified_group(i, prompt, lengths) for i, (prompt, lengths) in enumerate(shapes)]
    )
