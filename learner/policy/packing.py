"""From a step's trajectories to balanced micro-batches of packed rows.

    components
      StepBatch      the completions of one learner step, read from Arrow without copying tokens
      Segment        a prompt and some completions of its group: what packing moves around
      PackingPlan    segments of every micro-batch of every rank
      plan_packing   lengths -> PackingPlan (a pure function: all ranks compute the same plan)
      PackedRow      one micro-batch as tensors

A micro-batch is one row of at most `budget` tokens. A group larger than the budget is split and
its prompt repeated; one completion that does not fit has a micro-batch of its own. Segments are
dealt longest first to the least loaded micro-batch (Graham 1969, LPT), where load counts
attention beside tokens.

Shapes: B completions of the step, N completion tokens of a micro-batch, T tokens of its row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from learner.policy.attention import PackedLayout, SegmentLengths, build_layout

if TYPE_CHECKING:
    import pyarrow as pa

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class StepBatch:
    """The B completions of a learner step, in the order of the record batches.

    `offsets` [B + 1] cuts the flat token columns; `rewards_B` is NaN where a verifier gave none.
    """

    prompts: tuple[Ints, ...]
    group_B: Ints
    offsets: Ints
    token_ids: Ints
    behaviour_logprobs: npt.NDArray[np.float32]
    weight_versions: npt.NDArray[np.int32]
    loss_mask: npt.NDArray[np.bool_]
    rewards_B: Floats
    accuracy_B: Floats
    truncated_B: npt.NDArray[np.bool_]
    """Whether a completion was cut at the length limit."""

    @property
    def lengths_B(self) -> Ints:
        return np.diff(self.offsets)

    @property
    def trained_lengths_B(self) -> Ints:
        """Tokens of each completion that are in the loss."""
        return np.diff(np.concatenate([[0], np.cumsum(self.loss_mask)])[self.offsets])

    def tokens_of(self, completion: int) -> slice:
        return slice(int(self.offsets[completion]), int(self.offsets[completion + 1]))

    @classmethod
    def from_record_batches(cls, batches: Sequence[pa.RecordBatch]) -> StepBatch:
        """Read record batches, one a group, under `common.record.schema.trajectory_schema`."""
        if not batches:
            raise ValueError("a learner step needs at least one group")
        lengths = [np.diff(b.column("token_ids").offsets.to_numpy()) for b in batches]
        sizes = [b.num_rows for b in batches]
        return cls(
            prompts=tuple(
                np.asarray(b.column("prompt_ids")[0].values, dtype=np.int64) for b in batches
            ),
            group_B=np.repeat(np.arange(len(batches)), sizes),
            offsets=np.cumsum(np.concatenate([[0], *lengths])),
            token_ids=_flat(batches, "token_ids").astype(np.int64),
            behaviour_logprobs=_flat(batches, "behaviour_logprobs"),
            weight_versions=_flat(batches, "weight_versions"),
            loss_mask=_flat(batches, "loss_mask"),
            rewards_B=_nullable(batches, "reward"),
            accuracy_B=_nullable(batches, "accuracy"),
            truncated_B=np.array(
                [r == "length" for b in batches for r in b.column("finish_reason").to_pylist()],
                dtype=np.bool_,
            ),
        )


def _flat(batches: Sequence[pa.RecordBatch], name: str) -> npt.NDArray[Any]:
    return np.concatenate(
        [b.column(name).flatten().to_numpy(zero_copy_only=False) for b in batches]
    )


def _nullable(batches: Sequence[pa.RecordBatch], name: str) -> Floats:
    columns = [b.column(name).cast("float64").to_numpy(zero_copy_only=False) for b in batches]
    return np.concatenate(columns)


@dataclass(frozen=True)
class Segment:
    group: int
    completions: tuple[int, ...]
    """Indices into the step's B completions."""
    lengths: SegmentLengths

    @property
    def tokens(self) -> int:
        return self.lengths.tokens

    def cost(self, pairs_per_token: float) -> float:
        """Work in tokens: linear layers plus attention, `pairs_per_token` score pairs a token."""
        prompt = self.lengths.prompt
        pairs = prompt * prompt / 2
        pairs += sum(length * (prompt + length / 2) for length in self.lengths.completions)
        return self.tokens + pairs / pairs_per_token


@dataclass(frozen=True)
class PackingPlan:
    """`microbatches[rank][i]`: the segments of rank's i-th micro-batch; empty ones pad."""

    microbatches: tuple[tuple[tuple[Segment, ...], ...], ...]
    efficiency: float
    """Work (tokens and attention) / (ranks x the longest rank's, micro-batch by micro-batch, for
    the ranks wait for each other there). Rows hold no padding; repeated prompts count as work."""


def plan_packing(
    batch: StepBatch,
    trained_B: npt.NDArray[np.bool_],
    *,
    ranks: int,
    budget: int,
    share_prefix: bool,
    pairs_per_token: float,
) -> PackingPlan:
    """Deal the completions that train to micro-batches, equally many on every rank.

    A pure function of lengths: every rank calls it and takes its own share.

    Args:
        pairs_per_token: attention score pairs that cost as much as one token's linear layers;
            6 x hidden size for the usual block (24 h^2 against 4 h multiply-adds).
    """
    segments = _segments(batch, trained_B, ranks, budget, share_prefix)
    if not segments:
        return PackingPlan(((),) * ranks, 0.0)
    order = sorted(segments, key=lambda s: (-s.cost(pairs_per_token), s.group, s.completions))
    rounds = max(1, -(-sum(min(s.tokens, budget) for s in segments) // (budget * ranks)))
    bins = None
    while bins is None:
        bins = _deal(order, rounds * ranks, budget, pairs_per_token)
        rounds += 1
    loaded = sorted(
        ((sum(s.cost(pairs_per_token) for s in members), members) for members in bins),
        key=lambda pair: -pair[0],
    )  # those of one round next to each other, so that no rank waits for much
    microbatches = tuple(
        tuple(tuple(members) for _, members in loaded[rank::ranks]) for rank in range(ranks)
    )
    longest = sum(load for load, _ in loaded[::ranks])
    return PackingPlan(microbatches, sum(load for load, _ in loaded) / (ranks * longest))


def _segments(
    batch: StepBatch,
    trained_B: npt.NDArray[np.bool_],
    ranks: int,
    budget: int,
    share_prefix: bool,
) -> list[Segment]:
    lengths_B = batch.lengths_B
    prompts_B = np.array([len(batch.prompts[g]) for g in batch.group_B])
    chosen = np.flatnonzero(trained_B & (lengths_B > 0))
    if not len(chosen):
        return []
    # A group is also split when it holds more than one rank's share of the work.
    share = -(-int((lengths_B[chosen] + prompts_B[chosen]).sum()) // ranks)
    capacity = min(budget, share) if share_prefix else 0
    segments = []
    for group in np.unique(batch.group_B[chosen]).tolist():
        members = chosen[batch.group_B[chosen] == group]
        prompt = len(batch.prompts[group])
        for part in _split(members, lengths_B, capacity - prompt):
            lengths = SegmentLengths(prompt, tuple(int(lengths_B[c]) for c in part))
            segments.append(Segment(group, part, lengths))
    return segments


def _split(members: Ints, lengths_B: Ints, room: int) -> list[tuple[int, ...]]:
    """Members cut into as few even parts as fit `room` tokens each; singles may exceed it."""
    total = int(lengths_B[members].sum())
    if total <= room:
        return [tuple(members.tolist())]
    if room <= 0:
        return [(m,) for m in members.tolist()]
    order = sorted(members.tolist(), key=lambda c: (-int(lengths_B[c]), c))
    for count in range(-(-total // room), len(order)):
        parts: list[list[int]] = [[] for _ in range(count)]
        loads = [0] * count
        for completion in order:
            i = loads.index(min(loads))
            parts[i].append(completion)
            loads[i] += int(lengths_B[completion])
        if all(load <= room or len(p) == 1 for load, p in zip(loads, parts, strict=True)):
            return [tuple(sorted(part)) for part in parts]
    return [(m,) for m in order]


def _deal(
    order: Sequence[Segment], count: int, budget: int, pairs_per_token: float
) -> list[list[Segment]] | None:
    """Least loaded bin with room, segment by segment; None when `count` bins do not hold all."""
    bins: list[list[Segment]] = [[] for _ in range(count)]
    room = np.full(count, budget)
    load = np.zeros(count)
    for segment in order:
        fits = (room >= segment.tokens) | (room == budget)
        if not fits.any():
            return None
        i = int(np.where(fits, load, np.inf).argmin())
        bins[i].append(segment)
        room[i] -= segment.tokens
        load[i] += segment.cost(pairs_per_token)
    return bins


@dataclass(frozen=True)
class PackedRow:
    """One micro-batch as tensors. Its N completion tokens follow `completions`, in order."""

    input_ids_1T: Tensor
    position_ids_1T: Tensor
    layout: PackedLayout
    predictor_rows_N: Tensor
    """The row whose hidden state predicts completion token n."""
    labels_N: Tensor
    completions: tuple[int, ...]
    lengths: tuple[int, ...]


def pack_row(
    segments: Sequence[tuple[Ints, Sequence[Ints]]],
    completions: Sequence[int],
    device: torch.device | str,
) -> PackedRow:
    """Pack segments (prompt tokens, [completion tokens]) into a row; none give one idle token."""
    ids: list[Ints] = []
    positions: list[Ints] = []
    predictors: list[Ints] = []
    labels: list[Ints] = []
    lengths: list[SegmentLengths] = []
    row = 0
    for prompt, continuations in segments:
        ids += [prompt, *continuations]
        positions.append(np.arange(len(prompt)))
        last = row + len(prompt) - 1
        row += len(prompt)
        for tokens in continuations:
            positions.append(np.arange(len(prompt), len(prompt) + len(tokens)))
            # The first token is predicted by the prompt's last row, the others by their neighbour.
            first = [last][: len(tokens)]
            predictors.append(np.concatenate([first, np.arange(row, row + len(tokens) - 1)]))
            labels.append(tokens)
            row += len(tokens)
        lengths.append(SegmentLengths(len(prompt), tuple(len(c) for c in continuations)))
    if not segments:
        ids, positions = [np.zeros(1, np.int64)], [np.zeros(1, np.int64)]
        lengths = [SegmentLengths(1, ())]
    return PackedRow(
        _tensor(ids, device)[None],
        _tensor(positions, device)[None],
        build_layout(lengths, device),
        _tensor(predictors, device),
        _tensor(labels, device),
        tuple(completions),
        tuple(length for segment in lengths for length in segment.completions),
    )


def pack_microbatch(
    batch: StepBatch, segments: Sequence[Segment], device: torch.device | str
) -> PackedRow:
    """Pack one planned micro-batch into a row."""
    parts = [
        (batch.prompts[s.group], [batch.token_ids[batch.tokens_of(c)] for c in s.completions])
        for s in segments
    ]
    return pack_row(parts, [c for s in segments for c in s.completions], device)


def split_by_length(values: Sequence[float], lengths: Sequence[int]) -> list[list[float]]:
    """Cut N flat values back into one list a completion."""
    edges = np.cumsum([0, *lengths]).tolist()
    return [list(values[start:stop]) for start, stop in pairwise(edges)]


def _tensor(parts: Sequence[Ints], device: torch.device | str) -> Tensor:
    flat = np.concatenate([*parts, np.empty(0, np.int64)]).astype(np.int64)
    return torch.from_numpy(flat).to(device)
