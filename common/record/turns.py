"""The turns of an episode, as a column of the trajectory schema, and what it must agree with.

A completion is one episode. Its tokens are *sampled* by the policy or *given* to it: guidance, the
observations of an environment, the results of tools, what a template puts between turns. A given
token has a behaviour log-probability of NaN. A turn is a stretch of sampled tokens; all tokens
outside of turns are given. An answer without an environment is an episode of one turn.

    begin, end  the turn's tokens are [begin, end) of the completion; an empty turn has none
    finish      why the turn ended: `stop` or `length`
    reward      of the turn, where the environment gave one
    state       a name of the state the policy was in, where the environment gave one: turns of a
                group in one state can be compared
    calls       tool calls in it that the environment answered
    failed      of these, calls that could not be made

Legend: G completions of a batch, U turns of all of them, N their tokens back to back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

Ints = npt.NDArray[np.int64]

TURN = pa.struct(
    [
        pa.field("begin", pa.int32(), nullable=False),
        pa.field("end", pa.int32(), nullable=False),
        pa.field("finish", pa.string(), nullable=False),
        pa.field("reward", pa.float32()),
        pa.field("state", pa.string()),
        pa.field("calls", pa.int32()),
        pa.field("failed", pa.int32()),
    ]
)


def turn(
    begin: int,
    end: int,
    finish: str,
    reward: float | None = None,
    state: str | None = None,
) -> dict[str, Any]:
    """One entry of the column `turns`."""
    return {
        "begin": begin,
        "end": end,
        "finish": finish,
        "reward": reward,
        "state": state,
        "calls": 0,
        "failed": 0,
    }


@dataclass(frozen=True)
class Spans:
    """The turns of a batch as arrays, in the order of its rows."""

    row_U: Ints
    """Completion that each turn belongs to."""
    begin_U: Ints
    """First token on the axis of all N tokens."""
    end_U: Ints
    """One past the last token on that axis."""
    reward_U: npt.NDArray[np.float64]
    """NaN where the turn has none."""
    state_U: list[str | None]
    rows: int
    tokens: int
    """N."""

    @property
    def number_U(self) -> Ints:
        """Place of each turn in its completion, from 0."""
        return np.arange(len(self.row_U)) - np.searchsorted(self.row_U, self.row_U)

    @property
    def plain(self) -> bool:
        """Whether every completion is one turn without a reward of its own."""
        return len(self.row_U) == self.rows and bool(np.isnan(self.reward_U).all())

    def turn_N(self) -> Ints:
        """[N] number of the turn inside its completion, -1 on given tokens."""
        number_U = self.number_U
        turn_N = np.full(self.tokens, -1, dtype=np.int64)
        lengths_U = self.end_U - self.begin_U
        places = np.repeat(self.begin_U - np.cumsum(lengths_U) + lengths_U, lengths_U)
        turn_N[places + np.arange(int(lengths_U.sum()))] = np.repeat(number_U, lengths_U)
        return turn_N


def spans(batch: pa.RecordBatch) -> Spans:
    """The turns of `batch`, in the order of its rows."""
    column = batch.column("turns")
    per_row = np.diff(column.offsets.to_numpy())
    row_U = np.repeat(np.arange(batch.num_rows), per_row)
    flat = column.flatten()
    edges = _edges(batch)

    def numbers(name: str) -> Ints:
        return pc.struct_field(flat, name).to_numpy(zero_copy_only=False).astype(np.int64)

    rewards = pc.struct_field(flat, "reward").cast("float64").to_numpy(zero_copy_only=False)
    return Spans(
        row_U,
        edges[row_U] + numbers("begin"),
        edges[row_U] + numbers("end"),
        rewards,
        pc.struct_field(flat, "state").to_pylist(),
        batch.num_rows,
        int(edges[-1]),
    )


def tool_calls(batch: pa.RecordBatch) -> tuple[int, int]:
    """Tool calls in all turns of `batch`, and how many of them could not be made."""
    flat = batch.column("turns").flatten()
    if flat.type.get_field_index("calls") < 0:  # logged before calls were counted
        return 0, 0
    calls, failed = (pc.sum(pc.struct_field(flat, name)).as_py() for name in ("calls", "failed"))
    return calls or 0, failed or 0


def sampled(batch: pa.RecordBatch) -> npt.NDArray[np.bool_]:
    """[N] whether the policy sampled the token."""
    logprobs_N = batch.column("behaviour_logprobs").flatten().to_numpy(zero_copy_only=False)
    return ~np.isnan(logprobs_N)


def sampled_lengths(batch: pa.RecordBatch) -> Ints:
    """[G] tokens of each completion that the policy sampled."""
    counts = np.concatenate([[0], np.cumsum(sampled(batch))])
    return np.diff(counts[_edges(batch)]).astype(np.int64)


def trained_lengths(batch: pa.RecordBatch) -> Ints:
    """[G] tokens of each completion that are in the loss."""
    mask = batch.column("loss_mask").flatten().to_numpy(zero_copy_only=False)
    return np.diff(np.concatenate([[0], np.cumsum(mask)])[_edges(batch)])


def compared(sampled_G: Ints, trained_G: Ints) -> npt.NDArray[np.bool_]:
    """Which completions were sampled for others to compare with: none of their tokens trains."""
    return (sampled_G > 0) & (trained_G == 0)


def check_turns(batch: pa.RecordBatch) -> None:
    """Raise `ValueError` unless the turns of `batch` are its sampled tokens.

    Every completion has one. Turns ascend and do not overlap, lie inside their completion, and
    cover what has a behaviour log-probability, and nothing else.
    """
    edges, found = _edges(batch), spans(batch)
    inside = (found.begin_U >= edges[found.row_U]) & (found.end_U <= edges[found.row_U + 1])
    inside &= found.begin_U <= found.end_U
    if not np.isin(np.arange(batch.num_rows), found.row_U).all():
        raise ValueError("a completion has no turn: one without a sampled token has an empty one")
    same_row = np.diff(found.row_U) == 0
    apart = ~same_row | (found.begin_U[1:] >= found.end_U[:-1])
    if not inside.all() or not apart.all():
        raise ValueError("turns overlap, descend, or leave their completion")
    wrong_N = (found.turn_N() >= 0) != sampled(batch)
    if wrong_N.any():
        row = int(np.searchsorted(edges, int(np.flatnonzero(wrong_N)[0]), side="right")) - 1
        raise ValueError(
            f"the turns of completion {batch.column('completion_index')[row].as_py()} are not "
            "exactly its tokens with a behaviour log-probability"
        )


def _edges(batch: pa.RecordBatch) -> Ints:
    """[G + 1] where the completions begin on the axis of all tokens, and where the last ends."""
    lengths = np.diff(batch.column("token_ids").offsets.to_numpy())
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
