"""The segments of an episode, as a column of the trajectory schema.

A harness may hold several conversations in one episode: those of its sub-agents, or one that it
began anew from a summary. Each is a *segment*, with a prompt of its own. The row stays one episode:
its tokens are those of its segments behind their prompts, one segment behind the other.

    begin, end  the segment's tokens are [begin, end) of the episode
    prompt_ids  the tokens before them

An episode without segments is one conversation, behind the prompt of its group.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa

SEGMENT = pa.struct(
    [
        pa.field("begin", pa.int32(), nullable=False),
        pa.field("end", pa.int32(), nullable=False),
        pa.field("prompt_ids", pa.list_(pa.int32()), nullable=False),
    ]
)


def segment(begin: int, end: int, prompt_ids: Sequence[int]) -> dict[str, Any]:
    """One entry of the column `segments`."""
    return {"begin": begin, "end": end, "prompt_ids": list(prompt_ids)}


def have_segments(batch: pa.RecordBatch) -> bool:
    """Whether any episode of the batch has segments."""
    return bool(len(batch.column("segments").flatten()))


def check_segments(batch: pa.RecordBatch) -> None:
    """Raise `ValueError` unless the segments of each episode are all of its tokens, in order.

    None of them is empty, and each has a prompt: its first token follows from something.
    """
    if not have_segments(batch):
        return
    lengths = np.diff(batch.column("token_ids").offsets.to_numpy()).tolist()
    indices = batch.column("completion_index").to_pylist()
    for index, length, found in zip(
        indices, lengths, batch.column("segments").to_pylist(), strict=True
    ):
        if not found:
            continue
        edges = [0, *(each["end"] for each in found)]
        begins = [each["begin"] for each in found]
        ascending = all(one < other for one, other in pairwise(edges))
        if begins != edges[:-1] or edges[-1] != length or not ascending:
            raise ValueError(
                f"the segments of completion {index} are not its tokens, one behind the other"
            )
        if not all(each["prompt_ids"] for each in found):
            raise ValueError(f"a segment of completion {index} has no prompt")
