"""The rule that holds questions out: stable, of the right size, and monotone."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.data.held_out import is_held_out

EXPECTED = [True, True, False, False, False, False, False, False, True, False, False, True]


def test_the_rule_never_changes() -> None:
    """Trained models depend on it: another rule would let them see what they are tested on."""
    assert [is_held_out(f"question {i}") for i in range(12)] == EXPECTED


@given(st.text(), st.floats(0, 1), st.floats(0, 1))
def test_a_larger_fraction_only_adds_questions(question: str, one: float, other: float) -> None:
    small, large = sorted((one, other))
    assert not is_held_out(question, small) or is_held_out(question, large)
    assert not is_held_out(question, 0.0)
    assert is_held_out(question, 1.0)


@pytest.mark.parametrize("fraction", [0.1, 0.4, 0.9])
def test_the_share_is_the_fraction(fraction: float) -> None:
    share = sum(is_held_out(str(i), fraction) for i in range(10_000)) / 10_000
    assert abs(share - fraction) < 0.02


def test_white_space_at_the_ends_does_not_matter() -> None:
    assert all(is_held_out(f" {i}\n") == is_held_out(str(i)) for i in range(50))


@pytest.mark.parametrize("fraction", [-0.1, 1.1, float("nan")])
def test_a_fraction_outside_its_range_is_refused(fraction: float) -> None:
    with pytest.raises(ValueError, match="fraction"):
        is_held_out("question", fraction)
