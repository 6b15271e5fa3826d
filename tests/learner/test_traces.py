"""Traces: the scan against dense matrices, limits, isolation of packed sequences, gradients."""

from __future__ import annotations

import math
import time
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from maths_oracles import decays, dense_kernel, lengths, normal, random, seeds, slow_suffix

from learner.algorithm.traces import (
    RADIX,
    UNIFORM_BLOCK,
    LambdaTrace,
    PackedAxis,
    above_entropy_quantile,
    linear_recurrence,
    suffix_ratio,
    uniform_recurrence,
)

KINDS = ["recent", "both", "terminal"]


def packed(sizes: list[int]) -> PackedAxis:
    return PackedAxis(torch.tensor(sizes, dtype=torch.long))


def dense(axis: PackedAxis, kind: str, decay: float) -> torch.Tensor:
    sizes = axis.lengths_B.tolist()
    blocks = [dense_kernel(kind, size, decay) for size in sizes]
    return torch.block_diag(*blocks)[: sum(sizes), : sum(sizes)]


@given(st.integers(1, 3 * RADIX**2), seeds)
@settings(max_examples=30, deadline=None)
def test_recurrence_is_the_loop(size: int, seed: int) -> None:
    inputs_N, decays_N = normal(size, random(seed)), torch.rand(size, generator=random(seed + 1))
    expected, state = [], 0.0
    for x, a in zip(inputs_N.tolist(), decays_N.double().tolist(), strict=True):
        state = x + a * state
        expected.append(state)
    found_N = linear_recurrence(inputs_N, decays_N.double())
    torch.testing.assert_close(found_N, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("size", [1, 2, RADIX, RADIX + 1, 3 * RADIX + 5])
def test_recurrence_gradcheck(size: int) -> None:
    inputs_N = normal(size, random(size)).requires_grad_()
    decays_N = torch.rand(size, generator=random(1), dtype=torch.float64)
    decays_N[size // 2] = 0
    assert torch.autograd.gradcheck(linear_recurrence, (inputs_N, decays_N.requires_grad_()))


def test_recurrence_of_nothing_keeps_the_graph() -> None:
    nothing = torch.zeros(0, requires_grad=True)
    linear_recurrence(nothing, nothing).sum().backward()
    assert nothing.grad is not None


@given(
    st.lists(st.integers(0, 3 * UNIFORM_BLOCK), min_size=1, max_size=6).filter(any),
    st.sampled_from([0.0, 0.3, 0.99, 1.0]),
    seeds,
)
@settings(max_examples=60, deadline=None)
def test_one_decay_is_the_general_recurrence(sizes: list[int], decay: float, seed: int) -> None:
    axis = packed(sizes)
    inputs_N = normal(sum(sizes), random(seed)).requires_grad_()
    gradient_N = normal(sum(sizes), random(seed + 1))
    decays_N = torch.full_like(gradient_N, decay).masked_fill(axis.position_N == 0, 0.0)
    expected_N = linear_recurrence(inputs_N, decays_N)
    found_N = uniform_recurrence(inputs_N, decay, axis)
    torch.testing.assert_close(found_N, expected_N, rtol=1e-12, atol=1e-12)
    (expected,) = torch.autograd.grad(expected_N, inputs_N, gradient_N)
    (found,) = torch.autograd.grad(found_N, inputs_N, gradient_N)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_one_decay_does_not_leak_into_neighbours() -> None:
    axis = packed([2 * UNIFORM_BLOCK + 3, UNIFORM_BLOCK, 5])
    inputs_N = normal(int(axis.lengths_B.sum()), random(0)).requires_grad_()
    middle = slice(2 * UNIFORM_BLOCK + 3, 3 * UNIFORM_BLOCK + 3)
    others = torch.ones_like(inputs_N, dtype=torch.bool)
    others[middle] = False
    alone_N = uniform_recurrence(inputs_N, 0.9, axis)[middle]
    among_N = uniform_recurrence(inputs_N * (1 + 1e30 * others), 0.9, axis)[middle]
    assert torch.equal(alone_N, among_N)
    (gradient_N,) = torch.autograd.grad(alone_N.sum(), inputs_N)
    assert torch.equal(gradient_N[others], torch.zeros(int(others.sum()), dtype=torch.float64))


def test_recurrence_saves_two_vectors() -> None:
    size = 4096
    saved: list[int] = []
    inputs_N = torch.randn(size, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: saved.append(tensor.numel()) or tensor, lambda tensor: tensor
    ):
        linear_recurrence(inputs_N, torch.rand(size))
    assert sum(saved) == 2 * size


@given(lengths, decays, st.sampled_from(KINDS), st.booleans(), st.booleans(), seeds)
@settings(max_examples=60, deadline=None)
def test_trace_and_weights_are_the_dense_matrix(
    sizes: list[int], decay: float, kind: str, scaled: bool, mean: bool, seed: int
) -> None:
    axis = packed(sizes)
    inputs_N = normal(sum(sizes), random(seed))
    matrix = dense(axis, kind, decay)
    if mean:
        sums_N = matrix.sum(1, keepdim=True)
        matrix = matrix / torch.where(sums_N == 0, 1.0, sums_N)
    scale_N = None
    if scaled:
        scale_N = torch.rand(sum(sizes), generator=random(seed + 1), dtype=torch.float64)
        matrix = matrix * scale_N
    trace = LambdaTrace(axis, kind, decay, scale_N, mean=mean)
    torch.testing.assert_close(trace.apply(inputs_N), matrix @ inputs_N)
    torch.testing.assert_close(trace.weights(inputs_N), matrix.sum(0))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("decay", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("mean", [False, True])
def test_trace_gradcheck(kind: str, decay: float, mean: bool) -> None:
    axis = packed([1, 0, 7, 20])
    scale_N = torch.rand(28, generator=random(3), dtype=torch.float64) if mean else None
    trace = LambdaTrace(axis, kind, decay, scale_N, mean=mean)
    assert torch.autograd.gradcheck(trace.apply, (normal(28, random(0)).requires_grad_(),))


def test_four_tokens_by_hand() -> None:
    x_N = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    table = {
        # d = 1/2. recent rows: 1 | 1/2 1 | 1/4 1/2 1 | 1/8 1/4 1/2 1
        "recent": ([1.0, 2.5, 4.25, 6.125], [1.875, 1.75, 1.5, 1.0]),
        # both rows: 1 | 1 1 | 1 1/2 1 | 1 1/2 1/2 1
        "both": ([1.0, 3.0, 5.0, 7.5], [4.0, 2.0, 1.5, 1.0]),
    }
    for kind, (traced, weights) in table.items():
        trace = LambdaTrace(packed([4]), kind, 0.5)
        assert trace.apply(x_N).tolist() == traced
        assert trace.weights(x_N).tolist() == weights
    terminal = LambdaTrace(packed([4]), "terminal", 0.5)
    assert terminal.weights(x_N).tolist() == [0.125, 0.25, 0.5, 1.0]
    assert terminal.rows(x_N).tolist() == [0, 0, 0, 1]
    scale_N = torch.tensor([0.5, 1.0, 0.5, 1.0], dtype=torch.float64)
    scaled = LambdaTrace(packed([4]), "recent", 0.5, scale_N)
    assert scaled.apply(x_N).tolist() == [0.5, 2.25, 2.625, 5.3125]
    # rows 1 | 1/3 2/3 | 1/7 2/7 4/7 | 1/15 2/15 4/15 8/15
    mean = LambdaTrace(packed([4]), "recent", 0.5, mean=True)
    assert mean.apply(x_N).tolist() == pytest.approx([1, 5 / 3, 17 / 7, 49 / 15])


@given(lengths, seeds)
@settings(max_examples=20, deadline=None)
def test_limits_of_the_decay(sizes: list[int], seed: int) -> None:
    axis, x_N = packed(sizes), normal(sum(sizes), random(seed))
    for kind in ("recent", "both"):
        zero = LambdaTrace(axis, kind, 0.0).apply(x_N)
        expected = x_N.clone()
        if kind == "both":  # max(0^l, 0^k): the first token is in every row
            for start, size in zip(axis.starts_B.tolist(), sizes, strict=True):
                expected[start + 1 : start + size] += x_N[start] if size else 0
        torch.testing.assert_close(zero, expected)
        one = LambdaTrace(axis, kind, 1.0).apply(x_N)
        sums = torch.cat([part.cumsum(0) for part in x_N.split(sizes)])
        torch.testing.assert_close(one, sums)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_neighbours_do_not_leak(kind: str, dtype: torch.dtype) -> None:
    """A sequence gives the same alone and beside ones with enormous values."""
    alone = normal(33, random(0)).to(dtype)
    beside = torch.cat([torch.full((5,), 1e30, dtype=dtype), alone, torch.full((9,), -1e30)])
    for decay in (0.0, 0.99, 1.0):
        expected = LambdaTrace(packed([33]), kind, decay).apply(alone)
        found = LambdaTrace(packed([5, 33, 9]), kind, decay).apply(beside.to(dtype))[5:38]
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_the_ratio_behind_a_token_by_hand() -> None:
    """rho = 4, 1/2, 1, 2 | 3 | 1/2, 1/4: the token's own is not in it."""
    gap_N = torch.tensor([4, 0.5, 1, 2, 3, 0.5, 0.25], dtype=torch.float64).log()
    axis = packed([4, 1, 0, 2])

    def found(*args: float, **options: bool) -> list[float]:
        return suffix_ratio(gap_N, axis, *args, **options).tolist()

    assert found() == pytest.approx([1, 1, 1, 1, 1, 0.25, 1])
    assert found(by_factor=True) == pytest.approx([0.5, 1, 1, 1, 1, 0.25, 1])
    assert found(math.inf) == pytest.approx([1, 2, 2, 1, 1, 0.25, 1])
    assert found(1.5, by_factor=True) == pytest.approx([0.75, 1.5, 1.5, 1, 1, 0.25, 1])


@given(lengths, seeds, st.floats(0.01, 30.0))
@settings(max_examples=30, deadline=None)
def test_truncated_factors_leave_less_than_a_truncated_product(
    sizes: list[int], seed: int, scale: float
) -> None:
    axis, gap_N = packed(sizes), normal(sum(sizes), random(seed), scale)
    whole_N = suffix_ratio(gap_N, axis)
    factors_N = suffix_ratio(gap_N, axis, by_factor=True)
    assert (factors_N <= whole_N * (1 + 1e-9)).all() and (whole_N <= 1).all()
    for part, found_N in zip(gap_N.split(sizes), whole_N.split(sizes), strict=True):
        torch.testing.assert_close(found_N, slow_suffix(part))
    for part, found_N in zip(gap_N.split(sizes), factors_N.split(sizes), strict=True):
        torch.testing.assert_close(found_N, slow_suffix(part, by_factor=True))


def test_noise_alone_takes_the_credit_of_long_completions_where_factors_are_truncated() -> None:
    """0.02 nats, 1000 tokens behind: E min(0, N(0, s)) = -s / sqrt(2 pi), so e^-8."""
    gap_N = normal(1001 * 20, random(0), 0.02)
    axis = packed([1001] * 20)
    first_B = suffix_ratio(gap_N, axis, by_factor=True)[axis.starts_B]
    assert float(first_B.log().mean()) == pytest.approx(-20 / math.sqrt(2 * math.pi), rel=0.05)
    assert float(suffix_ratio(gap_N, axis)[axis.starts_B].mean()) > 0.5


def test_a_token_that_the_policy_would_not_choose_takes_the_credit_of_all_before_it() -> None:
    gap_N = torch.zeros(10, dtype=torch.float64)
    gap_N[6] = -800.0
    scale_N = suffix_ratio(gap_N, packed([10]))
    for kind in ("recent", "both"):
        weights_N = LambdaTrace(packed([10]), kind, 1.0, scale_N).weights(gap_N)
        assert weights_N.tolist() == [0, 0, 0, 0, 0, 0, 4, 3, 2, 1]


def test_selected_tokens_only() -> None:
    axis, x_N = packed([3, 5]), normal(8, random(0))
    entropy_N = torch.tensor([3.0, 1.0, 2.0, 5.0, 4.0, 4.0, 1.0, 2.0])
    select_N = above_entropy_quantile(entropy_N, axis, 0.6)
    assert select_N.tolist() == [True, False, True, True, True, True, False, False]
    weights_N = LambdaTrace(axis, "recent", 1.0, None, select_N).weights(x_N)
    assert weights_N.tolist() == [3, 0, 1, 5, 4, 3, 0, 0]
    assert above_entropy_quantile(torch.ones(8), axis, 0.99).all()
    assert above_entropy_quantile(entropy_N[:0], packed([0, 0]), 0.5).numel() == 0


@pytest.mark.parametrize(("quantile", "size"), [("0.29", 100), ("0.57", 100), ("0.58", 50)])
def test_a_quantile_is_the_decimal_number_that_was_written(quantile: str, size: int) -> None:
    """0.29 · 100 is below 29 in floating point."""
    below = Fraction(quantile) * size
    assert below.denominator == 1
    entropy_N = torch.arange(size, dtype=torch.float64).flip(0)
    kept_N = above_entropy_quantile(entropy_N, packed([size]), float(quantile))
    assert int(kept_N.sum()) == size - below.numerator


@given(lengths, st.floats(0, 0.999), seeds)
@settings(max_examples=30, deadline=None)
def test_quantile_keeps_the_rest(sizes: list[int], quantile: float, seed: int) -> None:
    entropy_N = normal(sum(sizes), random(seed))
    axis = packed(sizes)
    kept_B = axis.sum(above_entropy_quantile(entropy_N, axis, quantile))
    assert kept_B.tolist() == [size - int(quantile * size) for size in sizes]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mean", [False, True])
def test_long_sequences_in_float32(kind: str, mean: bool) -> None:
    """32,768 tokens: float32 agrees with float64, in well under a second."""
    x_N = normal(2 * 32768, random(0), 0.05)
    axis = packed([32768, 32768])
    for decay in (0.99, 1.0):
        trace = LambdaTrace(axis, kind, decay, mean=mean)
        begin = time.process_time()
        single_N = trace.apply(x_N.float())
        assert time.process_time() - begin < 1.0
        torch.testing.assert_close(single_N.double(), trace.apply(x_N), rtol=1e-4, atol=2e-3)
        scale = 32768 if decay == 1 else 200
        weights_N = trace.weights(x_N.float()).double()
        torch.testing.assert_close(weights_N, trace.weights(x_N), rtol=1e-4, atol=scale * 1e-6)


def test_published_mean_weights() -> None:
    """T = 768, gamma lambda = 0.99: mean c is about 87 (recent) and 149 (both)."""
    like_N = torch.zeros(768, dtype=torch.float64)
    means = [
        float(LambdaTrace(packed([768]), kind, 0.99).weights(like_N).mean())
        for kind in ("recent", "both")
    ]
    assert means == pytest.approx([87, 149], abs=0.5)


def test_axis_sums_are_differentiable_and_skip_empty_completions() -> None:
    axis = packed([0, 2, 0, 3, 0])
    values_N = torch.arange(5.0, dtype=torch.float64, requires_grad=True)
    assert axis.sum(values_N).tolist() == [0, 1, 0, 9, 0]
    assert axis.mean(values_N).tolist() == [0, 0.5, 0, 3, 0]
    assert axis.position_N.tolist() == [0, 1, 0, 1, 2]
    axis.mean(values_N).sum().backward()
    torch.testing.assert_close(
        values_N.grad, torch.tensor([1 / 2, 1 / 2, 1 / 3, 1 / 3, 1 / 3], dtype=torch.float64)
    )
