"""Turns of episodes: what is sampled, and rows that contradict themselves."""

from __future__ import annotations

import math
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.record.turns import TURN, check_turns, sampled_lengths, spans, turn

SCHEMA = pa.schema(
    [
        pa.field("completion_index", pa.int32()),
        pa.field("token_ids", pa.list_(pa.int32())),
        pa.field("behaviour_logprobs", pa.list_(pa.float32())),
        pa.field("turns", pa.list_(TURN)),
    ]
)


def row(index: int, pieces: list[tuple[bool, int]], **first: Any) -> dict[str, Any]:
    """A completion of pieces (sampled or given, tokens); `first` changes its first turn."""
    logprobs: list[float] = []
    turns = []
    for was_sampled, length in pieces:
        if was_sampled:
            turns.append(turn(len(logprobs), len(logprobs) + length, "stop"))
        logprobs += [-0.5 if was_sampled else math.nan] * length
    if turns:
        turns[0] |= first
    return {
        "completion_index": index,
        "token_ids": list(range(len(logprobs))),
        "behaviour_logprobs": logprobs,
        "turns": turns,
    }


def batch(*rows: dict[str, Any]) -> pa.RecordBatch:
    return pa.RecordBatch.from_pylist(list(rows), schema=SCHEMA)


PIECES = st.lists(st.tuples(st.booleans(), st.integers(0, 4)), max_size=6).filter(
    lambda pieces: any(was_sampled for was_sampled, _ in pieces)
)


@settings(deadline=None)
@given(st.lists(PIECES, min_size=1, max_size=4))
def test_every_token_is_of_the_turn_that_sampled_it(each: list[list[tuple[bool, int]]]) -> None:
    made = batch(*(row(i, pieces) for i, pieces in enumerate(each)))
    check_turns(made)
    expected: list[int] = []
    for pieces in each:
        number = -1
        for was_sampled, length in pieces:
            number += was_sampled
            expected += [number if was_sampled else -1] * length
    assert spans(made).turn_N().tolist() == expected
    assert sampled_lengths(made).tolist() == [
        sum(length for was_sampled, length in pieces if was_sampled) for pieces in each
    ]


def test_a_slice_of_a_batch_has_the_turns_of_its_rows() -> None:
    whole = batch(row(0, [(True, 3)]), row(1, [(False, 2), (True, 2), (False, 1), (True, 1)]))
    assert spans(whole.slice(1)).turn_N().tolist() == [-1, -1, 0, 0, -1, 1]
    assert sampled_lengths(whole.slice(1)).tolist() == [3]
    check_turns(whole.slice(1))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (row(4, [(True, 2), (False, 2), (True, 2)], end=3), "completion 4"),
        (row(4, [(True, 2), (False, 2), (True, 2)], end=5), "overlap"),
        (row(4, [(False, 2), (True, 2)], begin=3), "completion 4"),
        (row(4, [(True, 2)], end=3), "leave their completion"),
        (row(4, [(True, 2)], begin=-1), "leave their completion"),
        (row(4, [(False, 2)]), "no turn"),
    ],
)
def test_turns_that_are_not_what_was_sampled_are_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        check_turns(batch(row(0, [(True, 3)]), wrong))


def test_answers_are_plain_and_rewards_of_turns_are_not() -> None:
    assert spans(batch(row(0, [(True, 3)]), row(1, [(False, 1), (True, 2)]))).plain
    assert not spans(batch(row(0, [(True, 3)], reward=1.0))).plain
    assert not spans(batch(row(0, [(True, 1), (False, 1), (True, 1)]))).plain
