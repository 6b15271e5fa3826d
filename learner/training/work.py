"""What a learner step works on: the batch in parts, each of them an update, in micro-batches.

The parts are disjoint and made of whole groups, in the order of the batch. Every part has a loss
and a denominator of its own; ratios of all are to the policy before the first update.

Shapes: B completions of the step, N completion tokens of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from learner.algorithm.prefix_sets import prefix_set_sizes
from learner.algorithm.recipe import Prepared
from learner.policy.packing import PackedRow, Segment, StepBatch, pack_microbatch


@dataclass(frozen=True)
class Microbatch:
    """A packed row and what the loss needs beside it, on the device."""

    row: PackedRow
    indices_B: Tensor
    lengths_B: Tensor
    behaviour_logprobs_N: Tensor
    loss_mask_N: Tensor
    prefix_counts_N: Tensor | None


@dataclass(frozen=True)
class Part:
    """The completions of one update, and this rank's share of their micro-batches."""

    members_B: Tensor  # bool
    microbatches: Sequence[Microbatch]


@dataclass(frozen=True)
class Work:
    """The data of a step, and its updates in order."""

    batch: StepBatch
    estimated: Prepared
    first: Prepared
    """`estimated` with the token weights of the first update."""
    parts: Sequence[Part]


def parts_of(batch: StepBatch, updates: int) -> list[npt.NDArray[np.bool_]]:
    """Which completions each update trains on, [B] bool each, disjoint and all together.

    There are at most as many parts as groups; their numbers of groups differ by one at most.
    """
    groups = np.unique(batch.group_B)
    parts = np.array_split(groups, max(1, min(updates, len(groups))))
    return [np.isin(batch.group_B, part) for part in parts]


def load_microbatch(
    batch: StepBatch,
    segments: Sequence[Segment],
    device: torch.device,
    kept_B: npt.NDArray[np.bool_] | None,
) -> Microbatch:
    """Pack the completions of `segments` onto `device`.

    Args:
        kept_B: completions that count in prefix sets; None where no rule asks for these.
    """
    row = pack_microbatch(batch, segments, device)

    def tokens(column: npt.NDArray[Any]) -> Tensor:
        parts = [column[batch.tokens_of(c)] for c in row.completions]
        return torch.from_numpy(np.concatenate([column[:0], *parts])).to(device)

    counts_N = None
    if kept_B is not None:
        counts = [_prefix_counts(batch, segment, kept_B) for segment in segments]
        counts_N = torch.cat([torch.empty(0), *counts]).to(device)
    return Microbatch(
        row,
        torch.tensor(row.completions, dtype=torch.long),
        torch.tensor(row.lengths, dtype=torch.long, device=device),
        tokens(batch.behaviour_logprobs),
        tokens(batch.loss_mask),
        counts_N,
    )


def _prefix_counts(batch: StepBatch, segment: Segment, kept_B: npt.NDArray[np.bool_]) -> Tensor:
    """[n] sizes of prefix sets for the completions of one segment.

    Completions of the group that do not count are in no set, so that the shares of a token add up
    to one over those that do.
    """
    members = np.flatnonzero((batch.group_B == segment.group) & kept_B).tolist()
    ids = [batch.token_ids[batch.tokens_of(c)].tolist() for c in members]
    parts = dict(zip(members, prefix_set_sizes(ids).split([len(i) for i in ids]), strict=True))
    return torch.cat([parts[c] for c in segment.completions])
