"""Prefix process sets: the definition, pairwise, on random groups."""

from __future__ import annotations

import time

from hypothesis import given, settings
from hypothesis import strategies as st

from learner.algorithm.prefix_sets import prefix_set_sizes

groups = st.lists(st.lists(st.integers(0, 2), max_size=8), max_size=9)


@given(groups)
@settings(max_examples=200, deadline=None)
def test_definition(group: list[list[int]]) -> None:
    expected = [
        sum(other[: t + 1] == ids[: t + 1] for other in group)
        for ids in group
        for t in range(len(ids))
    ]
    assert prefix_set_sizes(group).tolist() == expected


def test_by_hand() -> None:
    group = [[7, 8, 9, 1], [7, 8, 9, 2], [7, 8], [5], [], [7, 3, 9]]
    assert prefix_set_sizes(group).tolist() == [4, 3, 2, 1, 4, 3, 2, 1, 4, 3, 1, 4, 1, 1]


def test_same_tokens_after_a_fork_are_not_shared() -> None:
    assert prefix_set_sizes([[1, 5, 5], [2, 5, 5]]).tolist() == [1] * 6


def test_identical_completions_and_a_group_of_one() -> None:
    assert prefix_set_sizes([[4, 4, 4]] * 5).tolist() == [5] * 15
    assert prefix_set_sizes([[4, 4, 4]]).tolist() == [1] * 3
    assert prefix_set_sizes([]).tolist() == []


def test_long_completions_are_linear() -> None:
    """8 x 32,768 tokens, half of them shared by all: a G x G x T table would be 2M entries."""
    shared = list(range(16384))
    group = [shared + [i] * 16384 for i in range(8)]
    begin = time.perf_counter()
    sizes_N = prefix_set_sizes(group)
    assert time.perf_counter() - begin < 2.0
    assert sizes_N.view(8, 2, 16384).unique(dim=-1).squeeze(-1).tolist() == [[8, 1]] * 8
