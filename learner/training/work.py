"""What a learner step works on: the batch in parts, each of them an update, in micro-batches.

The parts are disjoint and made of whole groups, in the order of the batch. Every part has a loss
and a denominator of its own; ratios of all are to the policy before the first update.

Shapes: B completions of the step, N completion tokens of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from learner.algorithm.grouped import RewardPart
from learner.algorithm.prefix_sets import prefix_set_sizes
from learner.algorithm.prepared import Prepared
from learner.algorithm.rewarded import Rewarded
from learner.policy.packing import PackedRow, Segment, pack_microbatch
from learner.policy.step_batch import StepBatch
from learner.training.job import LearnerJob


@dataclass(frozen=True)
class Microbatch:
    """A packed row and what the loss needs beside it, on the device."""

    row: PackedRow
    indices_B: Tensor
    """The completion of the step that each sequence of the row belongs to."""
    lengths_B: Tensor
    behaviour_logprobs_N: Tensor
    loss_mask_N: Tensor
    prefix_counts_N: Tensor | None
    advantages_N: Tensor | None
    turn_N: Tensor | None
    elsewhere_B: Tensor | None


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


def step_rewards(batch: StepBatch, job: LearnerJob) -> Rewarded:
    """What the completions of `batch` have earned, for the recipe."""
    parts = [
        RewardPart(torch.from_numpy(values_B), job.reward_weights.get(name, 1.0))
        for name, values_B in batch.parts.items()
    ]
    rewarded = batch.rewarded(job.primary_verifier)
    return replace(rewarded, parts=parts, scores_B=_scores(batch))


def _scores(batch: StepBatch) -> Tensor:
    """Mean log mu of the trained and sampled tokens of each completion, [B]; 0 without any."""
    counted = batch.loss_mask & ~np.isnan(batch.behaviour_logprobs)
    values = np.where(counted, batch.behaviour_logprobs, 0.0).astype(np.float64)
    sums, counts = (
        np.diff(np.concatenate([[0.0], np.cumsum(column)])[batch.offsets])
        for column in (values, counted)
    )
    return torch.from_numpy(sums / np.maximum(counts, 1))


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
    advantages_N: Tensor | None = None,
) -> Microbatch:
    """Pack the completions of `segments` onto `device`.

    Args:
        kept_B: completions that count in prefix sets; None where no rule asks for these.
        advantages_N: of all tokens of the step; None where a completion has one for all of its.
    """
    row = pack_microbatch(batch, segments, device)

    def tokens(column: npt.NDArray[Any]) -> Tensor:
        parts = [column[batch.sequences.tokens_of(c)] for c in row.completions]
        return torch.from_numpy(np.concatenate([column[:0], *parts])).to(device)

    counts_N = None
    if kept_B is not None:
        counts = [_prefix_counts(batch, segment, kept_B) for segment in segments]
        counts_N = torch.cat([torch.empty(0), *counts]).to(device)
    members_B = batch.sequences.completion_S[list(row.completions)]
    elsewhere_B = None
    if batch.elsewhere_B is not None:
        elsewhere_B = torch.from_numpy(batch.elsewhere_B[members_B]).to(device)
    return Microbatch(
        row,
        torch.from_numpy(members_B).long(),
        torch.tensor(row.lengths, dtype=torch.long, device=device),
        tokens(batch.behaviour_logprobs),
        tokens(batch.loss_mask),
        counts_N,
        None if advantages_N is None else tokens(advantages_N.numpy()),
        None if batch.turns is None else tokens(batch.turns.turn_N.numpy()),
        elsewhere_B,
    )


def _prefix_counts(batch: StepBatch, segment: Segment, kept_B: npt.NDArray[np.bool_]) -> Tensor:
    """[n] sizes of prefix sets for the sequences of one segment, among all behind its prompt.

    Completions of the group that do not count are in no set, so that the shares of a token add up
    to one over those that do.
    """
    sequences = batch.sequences
    kept_S = kept_B[sequences.completion_S]
    members = np.flatnonzero((sequences.prompt_S == segment.prompt) & kept_S).tolist()
    ids = [batch.token_ids[sequences.tokens_of(s)].tolist() for s in members]
    parts = dict(zip(members, prefix_set_sizes(ids).split([len(i) for i in ids]), strict=True))
    return torch.cat([parts[c] for c in segment.completions])
