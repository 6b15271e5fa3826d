"""Estimates of the KL divergence: exact expectations over a vocabulary, and by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from maths_oracles import normal, random, seeds

from learner.algorithm.kl import ESTIMATORS, k3
from learner.algorithm.surrogates import LOG_RATIO_LIMIT

NONE = torch.zeros(5, dtype=torch.float64)


def expectations(kind: str, seed: int, spread: float) -> tuple[torch.Tensor, ...]:
    """(E[estimate], KL, gradient of the former, gradient of the latter), tokens from the anchor.

    `spread` is how far the policy is off its anchor.
    """
    generator = random(seed)
    anchor_V = normal(5, generator).log_softmax(0)
    reference_V = normal(5, generator).log_softmax(0)
    table_V = (anchor_V + normal(5, generator, spread)).requires_grad_()
    logprobs_V = table_V.log_softmax(0)
    found_V = ESTIMATORS[kind](logprobs_V, reference_V, logprobs_V - anchor_V)
    found = (anchor_V.exp() * found_V).sum()
    exact = (logprobs_V.exp() * (logprobs_V - reference_V)).sum()
    gradients = [torch.autograd.grad(x, table_V, retain_graph=True)[0] for x in (found, exact)]
    return found, exact, *gradients


@pytest.mark.parametrize(
    ("kind", "value", "gradient"),
    [
        ("k1", True, False),
        ("k2", False, True),
        ("k3", True, False),
        ("straight_through", True, True),
        ("unbiased", True, True),
    ],
)
def test_what_is_unbiased_on_the_policys_own_tokens(kind: str, value: bool, gradient: bool) -> None:
    found, exact, slope, exact_slope = expectations(kind, 0, 0.0)
    assert torch.allclose(found, exact, rtol=1e-10) == value
    assert torch.allclose(slope, exact_slope, rtol=1e-10) == gradient
    if kind == "k1":
        assert slope.abs().max() < 1e-12  # as a loss it does nothing but add noise


@given(seeds)
@settings(max_examples=10, deadline=None)
def test_one_is_unbiased_on_the_tokens_of_another_policy(seed: int) -> None:
    found, exact, slope, exact_slope = expectations("unbiased", seed, 0.5)
    torch.testing.assert_close(found, exact)
    torch.testing.assert_close(slope, exact_slope)


@given(seeds, st.floats(-3, 3))
@settings(max_examples=20, deadline=None)
def test_k3_is_positive_and_zero_at_the_reference(seed: int, shift: float) -> None:
    logprobs_N = normal(5, random(seed))
    assert (k3(logprobs_N, logprobs_N, NONE) == 0).all()
    assert (k3(logprobs_N, logprobs_N + shift, NONE) >= 0).all()


def test_k3_by_hand_and_far_away() -> None:
    logprobs_N = torch.tensor([-1.0, -1.0, -90.0, 0.0], dtype=torch.float64, requires_grad=True)
    reference_N = torch.tensor([-2.0, 0.0, 0.0, -90.0], dtype=torch.float64)
    kl_N = k3(logprobs_N, reference_N, NONE[:4])
    assert kl_N[:2].tolist() == pytest.approx([math.exp(-1), math.e - 2])
    grad_N = torch.autograd.grad(kl_N.sum(), logprobs_N)[0]
    assert grad_N[:2].tolist() == pytest.approx([1 - math.exp(-1), 1 - math.e])
    steep = math.exp(LOG_RATIO_LIMIT)
    assert grad_N[2:].tolist() == pytest.approx([1 - steep, 1])  # towards the reference, bounded
