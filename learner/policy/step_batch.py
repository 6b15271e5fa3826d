"""The data of a learner step as arrays, read from the record batches of its groups.

Shapes: B completions of the step, S sequences of them, N all their tokens back to back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from common.errors import RunError
from common.record.schema import CUT, REWARD_PREFIX
from common.record.segments import have_segments
from common.record.turns import Spans, compared, spans
from learner.algorithm.rewarded import Branches, Rewarded, StepTokens, Trees, Turns
from learner.algorithm.traces import PackedAxis

if TYPE_CHECKING:
    import pyarrow as pa

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Sequences:
    """What the model reads as one: the completions of a step, or their segments; all [S].

    They lie back to back on the axis of all tokens, those of a completion in their order. Where
    completions have segments, each segment trains behind its own prompt, with the advantage and
    the token weight of its episode, and a trace begins anew in it. So its part of the loss is its
    share of the episode's trained tokens: episodes of more segments do not weigh more.
    """

    offsets: Ints
    """[S + 1] cuts the flat token columns."""
    completion_S: Ints
    prompt_S: Ints
    """Place of each one's prompt in `StepBatch.prompts`."""

    @property
    def lengths_S(self) -> Ints:
        return np.diff(self.offsets)

    def tokens_of(self, sequence: int) -> slice:
        return slice(int(self.offsets[sequence]), int(self.offsets[sequence + 1]))


@dataclass(frozen=True)
class StepBatch:
    """The B completions of a learner step, in the order of the record batches.

    `offsets` [B + 1] cuts the flat token columns; `rewards_B` is NaN where a verifier gave none.
    """

    prompts: tuple[Ints, ...]
    """Those of the groups, and behind them those of segments."""
    group_B: Ints
    offsets: Ints
    token_ids: Ints
    behaviour_logprobs: npt.NDArray[np.float32]
    weight_versions: npt.NDArray[np.int32]
    loss_mask: npt.NDArray[np.bool_]
    rewards_B: Floats
    accuracy_B: Floats
    truncated_B: npt.NDArray[np.bool_]
    """Whether a limit cut a completion short: that of tokens, of turns, or of the context."""
    turns: Turns | None = None
    """The turns of episodes; None where every completion is one turn."""
    parts: Mapping[str, Floats] = field(default_factory=dict)
    """Reward of every verifier by its name, [B] each, NaN where it gave none."""
    scores: npt.NDArray[np.float32] | None = None
    """Log-probability of every token under the recipe's scorer, nats; None before it has scored."""
    values: npt.NDArray[np.float32] | None = None
    """The critic's value of the state before every token; None before it has judged, or without."""
    own: npt.NDArray[np.float32] | None = None
    """Log-probability of every token under the policy before the step, where scores are compared
    with it; None where they are compared with the sampler."""
    scored_B: npt.NDArray[np.bool_] | None = None
    """Whether the scorer had something to read before the completion; None: before each."""
    contexts: tuple[Ints, ...] | None = None
    """Token ids of what a scorer reads before each completion; None where no run made any."""
    answers_B2: Ints | None = None
    """First token of each completion's answer and the one behind its last; equal for none."""
    segmented: Sequences | None = None
    """The segments of episodes, and completions behind prompts of their own; None where every
    completion is one sequence behind the prompt of its group."""
    branches: Branches | None = None
    """Measured values of prefixes; None where there are none."""
    trees: Trees | None = None
    """Which completions go on from inside of others; None where none does."""
    elsewhere_B: npt.NDArray[np.bool_] | None = None
    """Whether the completion was sampled behind another prompt than it is trained behind; None: no
    completion was."""

    @property
    def lengths_B(self) -> Ints:
        return np.diff(self.offsets)

    @property
    def trained_lengths_B(self) -> Ints:
        """Tokens of each completion that are in the loss."""
        return self._count(self.loss_mask)

    @property
    def sampled_lengths_B(self) -> Ints:
        """Tokens of each completion that the policy sampled."""
        return self._count(~np.isnan(self.behaviour_logprobs))

    @property
    def compared_B(self) -> npt.NDArray[np.bool_]:
        """Completions that were sampled for others to compare with."""
        return compared(self.sampled_lengths_B, self.trained_lengths_B)

    def _count(self, which: npt.NDArray[np.bool_]) -> Ints:
        return np.diff(np.concatenate([[0], np.cumsum(which)])[self.offsets])

    def rewarded(self, verifier_name: str) -> Rewarded:
        """What a recipe is given of the step.

        Args:
            verifier_name: who gave the rewards, for an error about one.
        """
        return Rewarded(
            torch.from_numpy(self.rewards_B),
            torch.from_numpy(self.group_B),
            torch.from_numpy(self.trained_lengths_B),
            verifier_name,
            torch.from_numpy(self.sampled_lengths_B),
            torch.from_numpy(self.truncated_B),
            StepTokens(
                PackedAxis(torch.from_numpy(self.lengths_B)),
                torch.from_numpy(self.token_ids),
                torch.from_numpy(self.loss_mask),
                torch.from_numpy(self.behaviour_logprobs),
                self.turns,
                None if self.scores is None else torch.from_numpy(self.scores),
                None if self.values is None else torch.from_numpy(self.values),
                None if self.own is None else torch.from_numpy(self.own),
                self.branches,
                self.trees,
            ),
            compared_B=torch.from_numpy(self.compared_B),
            scored_B=None if self.scored_B is None else torch.from_numpy(self.scored_B),
        )

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompts that sequences stand behind, each prompt once."""
        return sum(len(self.prompts[prompt]) for prompt in np.unique(self.sequences.prompt_S))

    @cached_property
    def sequences(self) -> Sequences:
        """What goes through the model as one: the completions, or their segments."""
        if self.segmented is not None:
            return self.segmented
        return Sequences(self.offsets, np.arange(len(self.group_B)), self.group_B)

    def tokens_of(self, completion: int) -> slice:
        return slice(int(self.offsets[completion]), int(self.offsets[completion + 1]))

    @classmethod
    def from_record_batches(cls, batches: Sequence[pa.RecordBatch]) -> StepBatch:
        """Read record batches, one a group, under `common.record.schema.trajectory_schema`."""
        if not batches:
            raise ValueError("a learner step needs at least one group")
        lengths = [np.diff(b.column("token_ids").offsets.to_numpy()) for b in batches]
        sizes = [b.num_rows for b in batches]
        offsets = np.cumsum(np.concatenate([[0], *lengths]))
        prompts = [np.asarray(b.column("prompt_ids")[0].values, dtype=np.int64) for b in batches]
        segmented = None
        if any(have_segments(batch) or _several_prompts(batch) for batch in batches):
            segmented = _segmented(batches, offsets, prompts)
        return cls(
            prompts=tuple(prompts),
            group_B=np.repeat(np.arange(len(batches)), sizes),
            offsets=offsets,
            token_ids=_flat(batches, "token_ids").astype(np.int64),
            behaviour_logprobs=_flat(batches, "behaviour_logprobs"),
            weight_versions=_flat(batches, "weight_versions"),
            loss_mask=_flat(batches, "loss_mask"),
            rewards_B=_nullable(batches, "reward"),
            accuracy_B=_nullable(batches, "accuracy"),
            truncated_B=np.array(
                [r in CUT for b in batches for r in b.column("finish_reason").to_pylist()],
                dtype=np.bool_,
            ),
            turns=_turns([spans(batch) for batch in batches]),
            parts={
                name.removeprefix(REWARD_PREFIX): _nullable(batches, name)
                for name in batches[0].schema.names
                if name.startswith(REWARD_PREFIX)
            },
            contexts=_contexts(batches),
            answers_B2=_answers(batches),
            segmented=segmented,
            branches=_branches(batches),
            trees=_trees(batches),
            elsewhere_B=_elsewhere(batches),
        )


def _several_prompts(batch: pa.RecordBatch) -> bool:
    """Whether completions of a group are trained behind different prompts."""
    column = batch.column("prompt_ids")
    lengths, flat = np.diff(column.offsets.to_numpy()), column.flatten().to_numpy()
    if (lengths != lengths[0]).any():
        return True
    rows = flat.reshape(batch.num_rows, -1)
    return bool((rows != rows[0]).any())


def _branches(batches: Sequence[pa.RecordBatch]) -> Branches | None:
    """The branches of all completions that have a value; None where none has any."""
    if not all("branches" in batch.schema.names for batch in batches):
        return None
    rows = [row for batch in batches for row in batch.column("branches").to_pylist()]
    found = [(b, each) for b, row in enumerate(rows) for each in row if each["count"]]
    if not found:
        return None
    return Branches(
        torch.tensor([completion for completion, _ in found]),
        torch.tensor([each["at"] for _, each in found]),
        torch.tensor([each["value"] for _, each in found], dtype=torch.float64),
    )


def _trees(batches: Sequence[pa.RecordBatch]) -> Trees | None:
    """Where completions of the step go on from inside of others; None where none does.

    Raises:
        RunError: one was not given first tokens of a completion before it in its group.
    """
    if not all("continues" in batch.schema.names for batch in batches):
        return None
    if all((batch.column("continues").to_numpy() < 0).all() for batch in batches):
        return None
    found: list[tuple[int, int]] = []  # parent and given tokens of each completion
    for batch in batches:
        names = ("completion_index", "continues", "guidance_length", "token_ids")
        first, places = len(found), dict[int, int]()
        rows = list(zip(*(batch.column(name).to_pylist() for name in names), strict=True))
        for row, (index, parent, given, ids) in enumerate(rows):
            place = places.get(parent, -1)
            at = place - first
            if parent >= 0 and (
                place < 0 or given < found[place][1] or rows[at][3][:given] != ids[:given]
            ):
                raise RunError(
                    f"completion {index} of group {batch.column('group_id')[0].as_py()} does not "
                    f"go on from completion {parent}: please report it. A rule of your own in "
                    "algorithm.rollout.follow_up.kind must give `continues` the index of an "
                    "earlier completion, and `guidance_ids` first tokens of it, those included "
                    "that it was given itself"
                )
            found.append((place, given if parent >= 0 else 0))
            places[index] = first + row
    parents, given_B = zip(*found, strict=True)
    return Trees(torch.tensor(parents), torch.tensor(given_B))


def _elsewhere(batches: Sequence[pa.RecordBatch]) -> npt.NDArray[np.bool_] | None:
    if not all("sampled_behind" in batch.schema.names for batch in batches):
        return None
    lengths = [np.diff(b.column("sampled_behind").offsets.to_numpy()) for b in batches]
    found: npt.NDArray[np.bool_] = np.concatenate(lengths) > 0
    return found if found.any() else None


def _contexts(batches: Sequence[pa.RecordBatch]) -> tuple[Ints, ...] | None:
    """Contexts of all completions; None where there are none, as in what older runs have left."""
    columns = [
        batch.column("context_ids") for batch in batches if "context_ids" in batch.schema.names
    ]
    found = [np.asarray(ids, np.int64) for column in columns for ids in column.to_pylist()]
    return tuple(found) if any(len(ids) for ids in found) else None


def _answers(batches: Sequence[pa.RecordBatch]) -> Ints | None:
    names = ("answer_begin", "answer_end")
    if not all(name in batch.schema.names for batch in batches for name in names):
        return None
    columns = [np.concatenate([b.column(name).to_numpy() for b in batches]) for name in names]
    return np.stack(columns, axis=1).astype(np.int64)


def _segmented(batches: Sequence[pa.RecordBatch], offsets: Ints, prompts: list[Ints]) -> Sequences:
    """The sequences of a step where some stand behind prompts of their own.

    Appends those prompts to `prompts`.
    """
    starts, completions, prompt_of = [], [], []
    known: dict[tuple[int, bytes], int] = {}
    completion = 0
    for group, batch in enumerate(batches):
        columns = (batch.column(name).to_pylist() for name in ("prompt_ids", "segments"))
        for behind, found in zip(*columns, strict=True):
            first = int(offsets[completion])
            for each in found or [{"prompt_ids": behind, "begin": 0}]:
                ids = np.asarray(each["prompt_ids"], dtype=np.int64)
                place = group
                if found or not np.array_equal(ids, prompts[group]):
                    place = known.setdefault((group, ids.tobytes()), len(prompts))
                if place == len(prompts):
                    prompts.append(ids)
                starts.append(first + each["begin"])
                completions.append(completion)
                prompt_of.append(place)
            completion += 1
    return Sequences(
        np.array([*starts, int(offsets[-1])]), np.array(completions), np.array(prompt_of)
    )


def _turns(found: Sequence[Spans]) -> Turns | None:
    """The turns of all groups; None where every completion is one turn without a reward."""
    if all(spans.plain for spans in found):
        return None
    first = np.cumsum([0, *(spans.rows for spans in found)])
    states = [state for spans in found for state in spans.state_U]
    names = {name: i for i, name in enumerate(sorted({name for name in states if name}))}
    return Turns(
        _joined([spans.row_U + f for spans, f in zip(found, first, strict=False)]),
        _joined([spans.number_U for spans in found]),
        _joined([spans.turn_N() for spans in found]),
        _joined([np.nan_to_num(spans.reward_U, nan=0.0) for spans in found]),
        torch.tensor([names.get(name or "", -1) for name in states], dtype=torch.long),
    )


def _joined(arrays: Sequence[npt.NDArray[Any]]) -> Tensor:
    return torch.from_numpy(np.concatenate(arrays))


def _flat(batches: Sequence[pa.RecordBatch], name: str) -> npt.NDArray[Any]:
    return np.concatenate(
        [b.column(name).flatten().to_numpy(zero_copy_only=False) for b in batches]
    )


def _nullable(batches: Sequence[pa.RecordBatch], name: str) -> Floats:
    columns = [b.column(name).cast("float64").to_numpy(zero_copy_only=False) for b in batches]
    return np.concatenate(columns)
