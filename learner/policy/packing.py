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

In a group that is a tree a completion shares the tokens that it was given with the completion that
they are of, where both are in one segment (`learner.policy.tries`). A tree that is larger than the
budget is split at its nodes, from the top.

Shapes: B completions of the step, S sequences of them, N completion tokens of a micro-batch, T
tokens of its row, M of the N that have rows of their own.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from learner.policy.attention import PackedLayout, build_layout
from learner.policy.step_batch import Ints, StepBatch
from learner.policy.tries import SegmentLengths


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
        own = zip(self.lengths.completions, self.lengths.given_to, strict=True)
        pairs += sum(length * (prompt + given + length / 2) for length, given in own)
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
        forest = _Forest(batch, members.tolist())
        for part in _split(forest, capacity - size):
            segments.append(Segment(prompt, part, forest.lengths(size, part)))
    return segments


class _Forest:
    """Sequences behind one prompt, of which some were given first tokens of others."""

    def __init__(self, batch: StepBatch, members: Sequence[int]) -> None:
        self.members = members
        self._tokens = {m: int(batch.sequences.lengths_S[m]) for m in members}
        self._trees = None if batch.segmented is not None else batch.trees
        self._shared = self._shares(members)
        self._below: dict[int, list[int]] = {m: [] for m in members}
        for member, (other, _) in self._shared.items():
            self._below[other].append(member)

    def _shares(self, part: Sequence[int]) -> dict[int, tuple[int, int]]:
        """Whose first tokens a sequence of `part` can read there, and how many.

        Where the one that they are of is elsewhere, it is another of `part` that has them too.
        """
        if self._trees is None:
            return {}
        parent_B, given_B = self._trees.parent_B, self._trees.given_B
        there, found = set(part), dict[int, tuple[int, int]]()
        having: dict[int, list[tuple[int, int]]] = defaultdict(list)  # by who is elsewhere
        for member in part:
            best, above, tokens = (-1, 0), int(parent_B[member]), int(given_B[member])
            while above >= 0:
                known = [(above, tokens)] if above in there else having[above]
                for other, has in known:
                    if min(has, tokens) > best[1]:
                        best = other, min(has, tokens)
                if above in there:
                    break
                having[above].append((member, tokens))
                above, tokens = int(parent_B[above]), min(tokens, int(given_B[above]))
            if best[1]:
                found[member] = best
        return found

    def lengths(self, prompt: int, part: Sequence[int]) -> SegmentLengths:
        """Lengths of a segment of `part`."""
        shared = self._shares(part)
        if not shared:
            return SegmentLengths(prompt, tuple(self._tokens[member] for member in part))
        place = {member: i for i, member in enumerate(part)} | {-1: -1}
        pairs = [shared.get(member, (-1, 0)) for member in part]
        return SegmentLengths(
            prompt,
            tuple(self._tokens[m] - given for m, (_, given) in zip(part, pairs, strict=True)),
            tuple(place[other] for other, _ in pairs),
            tuple(given for _, given in pairs),
        )

    def trees(self, room: int | None = None) -> list[tuple[int, tuple[int, ...]]]:
        """(tokens, members) of each tree; one of more than `room` tokens is cut from the top."""
        waiting = [member for member in self.members if member not in self._shared]
        found = []
        for top in waiting:
            members = [top]
            for member in members:
                members += self._below[member]
            own = (self._tokens[m] - self._shared[m][1] for m in members[1:])
            tokens = self._tokens[top] + sum(own)
            if room is not None and tokens > room and len(members) > 1:
                waiting += self._below[top]
                tokens, members = self._tokens[top], [top]
            found.append((tokens, tuple(sorted(members))))
        return found


def _split(forest: _Forest, room: int) -> list[tuple[int, ...]]:
    """Members cut into as few even parts as fit `room` tokens each; singles may exceed it."""
    if sum(tokens for tokens, _ in forest.trees()) <= room:
        return [tuple(forest.members)]
    if room <= 0:
        return [(m,) for m in forest.members]
    order = sorted(forest.trees(room), key=lambda tree: (-tree[0], tree[1]))
    total = sum(tokens for tokens, _ in order)
    for count in range(-(-total // room), len(order)):
        parts: list[list[tuple[int, ...]]] = [[] for _ in range(count)]
        loads = [0] * count
        for tokens, members in order:
            i = loads.index(min(loads))
            parts[i].append(members)
            loads[i] += tokens
        if all(load <= room or len(p) == 1 for load, p in zip(loads, parts, strict=True)):
            return [tuple(sorted(m for members in part for m in members)) for part in parts]
    return [members for _, members in order]


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
    """One micro-batch as tensors. Its N completion tokens follow `completions`, in order.

    M of them have rows of their own: all but those that a completion reads of another.
    """

    input_ids_1T: Tensor
    position_ids_1T: Tensor
    layout: PackedLayout
    predictor_rows_M: Tensor
    """The row whose hidden state predicts token m."""
    labels_M: Tensor
    completions: tuple[int, ...]
    """Indices into the step's S sequences, where it was packed from a step."""
    lengths: tuple[int, ...]
    """All tokens of each."""
    place_N: Tensor | None = None
    """Which of the M each completion token is; None where it has a row of its own, each."""

    def of_tokens(self, found_M: Tensor) -> Tensor:
        """What is known of the M tokens with rows, for all N."""
        return found_M if self.place_N is None else found_M.index_select(0, self.place_N)


def pack_row(
    segments: Sequence[tuple[Ints, Sequence[Ints]]],
    completions: Sequence[int],
    device: torch.device | str,
    lengths: Sequence[SegmentLengths] | None = None,
) -> PackedRow:
    """Pack segments (prompt tokens, [completion tokens]) into a row; none give one idle token.

    Args:
        lengths: of each segment, where completions read rows of others.
    """
    if lengths is None:
        lengths = [SegmentLengths(len(p), tuple(map(len, found))) for p, found in segments]
    ids: list[Ints] = []
    positions: list[Ints] = []
    predictors: list[Ints] = []
    labels: list[Ints] = []
    places: list[Ints] = []
    row = scored = 0
    for (prompt, continuations), segment in zip(segments, lengths, strict=True):
        ids.append(prompt)
        positions.append(np.arange(len(prompt)))
        for tokens, given, way in zip(continuations, segment.given_to, segment.ways, strict=True):
            ids.append(tokens[given:])
            positions.append(np.arange(len(prompt) + given, len(prompt) + len(tokens)))
            # A token is predicted by the row before it on its way.
            predictors.append(row + way[len(prompt) + given - 1 : len(prompt) + len(tokens) - 1])
            labels.append(tokens[given:])
        # Behind the prompt, the rows of a segment are those of its tokens, one by one.
        places += [scored + way[len(prompt) :] - len(prompt) for way in segment.ways]
        row += segment.tokens
        scored += segment.tokens - len(prompt)
    if not segments:
        ids, positions = [np.zeros(1, np.int64)], [np.zeros(1, np.int64)]
        lengths = [SegmentLengths(1, ())]
    shares = any(segment.parents for segment in lengths)
    return PackedRow(
        _tensor(ids, device)[None],
        _tensor(positions, device)[None],
        build_layout(lengths, device),
        _tensor(predictors, device),
        _tensor(labels, device),
        tuple(completions),
        tuple(len(tokens) for _, continuations in segments for tokens in continuations),
        _tensor(places, device) if shares else None,
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
    completions = [c for s in segments for c in s.completions]
    return pack_row(parts, completions, device, [s.lengths for s in segments])


def split_by_length(values: Sequence[float], lengths: Sequence[int]) -> list[list[float]]:
    """Cut N flat values back into one list a completion."""
    edges = np.cumsum([0, *lengths]).tolist()
    return [list(values[start:stop]) for start, stop in pairwise(edges)]


def _tensor(parts: Sequence[Ints], device: torch.device | str) -> Tensor:
    flat = np.concatenate([*parts, np.empty(0, np.int64)]).astype(np.int64)
    return torch.from_numpy(flat).to(device)
