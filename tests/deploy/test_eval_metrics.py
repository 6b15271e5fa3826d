"""avg@k, pass@k, maj@k and their intervals, against enumeration and against one another."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deploy.eval.metrics import avg_at_n, bootstrap, majority, pass_at_k, powers_of_two

samples = st.lists(st.booleans(), min_size=1, max_size=9)


def pass_by_enumeration(correct: Sequence[bool], k: int) -> Fraction:
    """Over all subsets of k samples."""
    subsets = list(itertools.combinations(correct, k))
    return Fraction(sum(any(subset) for subset in subsets), len(subsets))


@given(samples, st.data())
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(
    correct: list[bool], data: st.DataObject
) -> None:
    k = data.draw(st.integers(1, len(correct)))
    (found,) = pass_at_k(len(correct), [sum(correct)], k)
    assert found == pytest.approx(float(pass_by_enumeration(correct, k)), abs=1e-12)


@given(samples)
def test_pass_at_one_is_avg(correct: list[bool]) -> None:
    (passed,) = pass_at_k(len(correct), [sum(correct)], 1)
    (average,) = avg_at_n(np.array([correct]))
    assert passed == pytest.approx(average, abs=1e-12)


@given(st.integers(1, 2000), st.data())
def test_pass_at_k_is_exact_where_binomials_overflow(n: int, data: st.DataObject) -> None:
    c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    exact = 1 - Fraction(math.comb(n - c, k), math.comb(n, k))
    (found,) = pass_at_k(n, [c], k)
    assert found == pytest.approx(float(exact), abs=1e-9)
    assert 0.0 <= found <= 1.0


def test_pass_at_k_by_hand() -> None:
    # N = 4, one right: pass@2 = 1 - C(3,2)/C(4,2) = 1/2; all wrong 0; all right 1.
    assert pass_at_k(4, [0, 1, 2, 3, 4], 2) == pytest.approx([0, 1 / 2, 5 / 6, 1, 1])
    assert pass_at_k(4, [0, 1], 4) == pytest.approx([0, 1])


@pytest.mark.parametrize(("n", "c", "k"), [(4, 1, 0), (4, 1, 5), (4, 5, 1), (4, -1, 1)])
def test_impossible_numbers_are_refused(n: int, c: int, k: int) -> None:
    with pytest.raises(ValueError, match="must lie in"):
        pass_at_k(n, [c], k)


def majority_by_draws(answers: Sequence[str | None], correct: Sequence[bool]) -> Fraction:
    """Expectation over which of the most frequent answers wins, and which of its samples speaks."""
    counts = Counter(answer for answer in answers if answer is not None)
    if not counts:
        return Fraction(0)
    most = max(counts.values())
    winners = [answer for answer, count in counts.items() if count == most]
    marks = [
        Fraction(int(right))
        for winner in winners
        for answer, right in zip(answers, correct, strict=True)
        if answer == winner
    ]
    return sum(marks, Fraction(0)) / len(marks)


votes = st.lists(
    st.tuples(st.sampled_from(["1", "2", "3", None]), st.booleans()), min_size=1, max_size=9
)


@given(votes)
def test_majority_is_the_expected_mark_of_a_winner(cast: list[tuple[str | None, bool]]) -> None:
    answers, correct = [answer for answer, _ in cast], [right for _, right in cast]
    expected = float(majority_by_draws(answers, correct))
    assert majority(answers, correct) == pytest.approx(expected, abs=1e-12)


@given(votes, st.randoms())
def test_majority_does_not_look_at_the_order(
    cast: list[tuple[str | None, bool]], random: object
) -> None:
    mixed = list(cast)
    random.shuffle(mixed)  # type: ignore[attr-defined]
    once = majority([a for a, _ in cast], [r for _, r in cast])
    assert majority([a for a, _ in mixed], [r for _, r in mixed]) == pytest.approx(once)


@pytest.mark.parametrize(
    ("answers", "right", "mark"),
    [
        (["7", "7", "8"], "7", 1.0),
        (["7", "8", "8"], "7", 0.0),
        (["7", "8"], "7", 0.5),  # a tie is shared
        (["7", "8", "9"], "7", 1 / 3),
        ([None, None, "7"], "7", 1.0),  # no answer, no vote
        ([None, None], "7", 0.0),
        (["7", "7", "8", "8", "9"], "9", 0.0),
    ],
)
def test_majority_by_hand(answers: list[str | None], right: str, mark: float) -> None:
    assert majority(answers, [answer == right for answer in answers]) == pytest.approx(mark)


def test_a_bootstrap_agrees_with_the_binomial_it_estimates() -> None:
    """The mean of 100 marks of 0 and 1, half right: a binomial, whose quantiles are known."""
    marks = np.repeat([0.0, 1.0], 50)
    (estimate,) = bootstrap(marks[None], seed=1)
    assert estimate.value == 0.5
    # 2.5 % and 97.5 % quantiles of Binomial(100, 1/2) are 40 and 60.
    assert estimate.low == pytest.approx(0.40, abs=0.011)
    assert estimate.high == pytest.approx(0.60, abs=0.011)


def test_a_bootstrap_of_three_problems_is_that_of_all_27_draws() -> None:
    values = np.array([0.0, 0.25, 1.0])
    means = np.sort([np.mean(draw) for draw in itertools.product(values, repeat=3)])
    cases = {round(mean, 9) for mean in means}
    (estimate,) = bootstrap(values[None], seed=3, confidence=0.8)
    assert round(estimate.low, 9) in cases
    assert round(estimate.high, 9) in cases
    # The exact 10 % and 90 % points of the 27 equally likely means.
    assert estimate.low == pytest.approx(np.quantile(means, 0.1, method="inverted_cdf"))
    assert estimate.high == pytest.approx(np.quantile(means, 0.9, method="inverted_cdf"))


def test_metrics_share_their_draws_and_a_seed_repeats_them() -> None:
    values = np.random.default_rng(0).random(30)
    both = bootstrap([values, 1.0 - values], seed=5, resamples=1001)
    assert both[0].low == pytest.approx(1.0 - both[1].high)
    assert both == bootstrap([values, 1.0 - values], seed=5, resamples=1001)
    assert both != bootstrap([values, 1.0 - values], seed=6, resamples=1001)


@settings(max_examples=25)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_an_interval_holds_within_the_values(values: list[float]) -> None:
    (estimate,) = bootstrap([values], seed=0, resamples=200)
    assert min(values) - 1e-9 <= estimate.low <= estimate.high <= max(values) + 1e-9


@pytest.mark.parametrize("values", [[[]], [[1.0, math.nan]]])
def test_nothing_and_nan_have_no_interval(values: list[list[float]]) -> None:
    with pytest.raises(ValueError, match="bootstrap"):
        bootstrap(values, seed=0)


def test_the_k_of_pass_at_k() -> None:
    assert powers_of_two(1) == [1]
    assert powers_of_two(8) == [1, 2, 4, 8]
    assert powers_of_two(10) == [1, 2, 4, 8, 10]
