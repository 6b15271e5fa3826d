"""From a step's trajectories to balanced micro-batches of packed rows.

    components
      Segment        a prompt and some sequences behind it: what packing moves around
      PackingPlan    segments of every micro-batch of every rank
      plan_packing   lengths -> PackingPlan (a pure function: all ranks compute the same plan)
      PackedRow      one micro-batch as tensors

A sequence is a completion, or a segment of an episode that has several
(`learner.policy.step_batch.Sequences`). "Completion" below means such a sequence: packing does not
tell them apart.

A micro-batch is one row of at most `budget` tokens. A group larger than the budget is split and
its prompt repeated; one completion that does not fit has a micro-batch of its own. Segments are
dealt longest first to the least loaded micro-batch (Graham 1969, LPT), where load counts
attention beside tokens.

Shapes: B completions of the step, S sequences of them, N completion tokens of a micro-batch, T
tokens of its row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from learner.policy.attention import PackedLayout, SegmentLengths, build_layout
from learner.policy.step_batch import Ints, StepBatch


@dataclass(frozen=True)
class Segment:
    prompt: int
    """Place in `StepBatch.prompts`."""
    completions: tuple[int, ...]
    """Indices into the step's S sequences."""
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
    order = sorted(segments, key=lambda s: (-s.cost(pairs_per_token), s.prompt, s.completions))
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
    sequences = batch.sequences
    lengths_S, prompt_S = sequences.lengths_S, sequences.prompt_S
    prompts_S = np.array([len(batch.prompts[prompt]) for prompt in prompt_S])
    chosen = np.flatnonzero(trained_B[sequences.completion_S] & (lengths_S > 0))
    if not len(chosen):
        return []
    # A group is also split when it holds more than one rank's share of the work.
    share = -(-int((lengths_S[chosen] + prompts_S[chosen]).sum()) // ranks)
    capacity = min(budget, share) if share_prefix else 0
    segments = []
    for prompt in np.unique(prompt_S[chosen]).tolist():
        members = chosen[prompt_S[chosen] == prompt]
        size = len(batch.prompts[prompt])
        for part in _split(members, lengths_S, capacity - size):
            lengths = SegmentLengths(size, tuple(int(lengths_S[c]) for c in part))
            segments.append(Segment(prompt, part, lengths))
    return segments


def _split(members: Ints, lengths_S: Ints, room: int) -> list[tuple[int, ...]]:
    """Members cut into as few even parts as fit `room` tokens each; singles may exceed it."""
    total = int(lengths_S[members].sum())
    if total <= room:
        return [tuple(members.tolist())]
    if room <= 0:
        return [(m,) for m in members.tolist()]
    order = sorted(members.tolist(), key=lambda c: (-int(lengths_S[c]), c))
    for count in range(-(-total // room), len(order)):
        parts: list[list[int]] = [[] for _ in range(count)]
        loads = [0] * count
        for completion in order:
            i = loads.index(min(loads))
            parts[i].append(completion)
            loads[i] += int(lengths_S[completion])
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
    """Indices into the step's S sequences, where it was packed from a step."""
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
        (
            batch.prompts[s.prompt],
            [batch.token_ids[batch.sequences.tokens_of(c)] for c in s.completions],
        )
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
