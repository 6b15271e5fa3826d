"""Credit: the interface of trace, weight and prefix shares to the objective."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from maths_oracles import decays, dense_kernel, normal, random, slow_suffix

from common.config.algorithm import CreditConfig
from learner.algorithm.credit import CREDITS, Credit, CreditInputs
from learner.algorithm.traces import PackedAxis

AXIS = PackedAxis(torch.tensor([4, 1, 0, 3]))
X = normal(8, random(0))
LOGPROBS = -X.abs() - 0.1
GAP = normal(8, random(1), 0.5)
COUNTS = torch.tensor([4.0, 2, 1, 1, 4, 4, 2, 1])


def credit(**options) -> Credit:
    config = CreditConfig(**options)
    return CREDITS.rule(config)(CreditInputs(X, GAP, AXIS, X.abs(), COUNTS, LOGPROBS, LOGPROBS - X))


def test_broadcast_is_the_identity() -> None:
    found = credit()
    assert found.log_ratio_N is X
    for ones_N in (found.weight_N, found.kl_weight_N, found.gradient_weight_N):
        assert ones_N.tolist() == [1] * 8


def test_prefix_sets_share_surrogate_and_kl() -> None:
    found = credit(kind="prefix_sets")
    assert found.weight_N.tolist() == [0.25, 0.5, 1, 1, 0.25, 0.25, 0.5, 1]
    assert found.kl_weight_N is found.weight_N


@given(st.sampled_from(["recent", "both", "terminal"]), decays, st.booleans())
@settings(max_examples=30, deadline=None)
def test_applications_have_the_same_gradient_weight(kind: str, decay: float, cut: bool) -> None:
    options = {"kind": "lambda_trace", "trace": kind, "lambda_": decay, "cut": cut}
    inside, outside = (credit(**options, application=name) for name in ("trace", "weight"))
    assert torch.equal(inside.gradient_weight_N, outside.gradient_weight_N)
    assert outside.log_ratio_N is X
    for part in (slice(0, 4), slice(4, 5), slice(5, 8)):
        kernel = dense_kernel(kind, part.stop - part.start, decay)
        kernel = kernel * (slow_suffix(GAP[part]) if cut else 1.0)
        torch.testing.assert_close(inside.log_ratio_N[part], kernel @ X[part])
        torch.testing.assert_close(outside.weight_N[part], kernel.sum(0))
        # weight * d z / d x, summed over rows, is the gradient weight.
        torch.testing.assert_close(inside.weight_N[part] @ kernel, inside.gradient_weight_N[part])


@pytest.mark.parametrize("application", ["trace", "weight"])
@pytest.mark.parametrize("kind", ["recent", "both", "terminal"])
def test_normalised_credit_has_mean_one(application: str, kind: str) -> None:
    options = {"kind": "lambda_trace", "trace": kind, "application": application}
    found = credit(**options, normalize="mean")
    assert AXIS.mean(found.gradient_weight_N).tolist() == pytest.approx([1, 1, 0, 1])
    # The ratio that is clipped is the same: only the scale of the gradient changes.
    assert torch.equal(found.log_ratio_N, credit(**options).log_ratio_N)


def test_a_scale_by_the_mean_does_not_give_back_what_a_cut_takes() -> None:
    options = {"kind": "lambda_trace", "application": "weight", "normalize": "mean"}
    plain_N, cut_N = credit(**options).weight_N, credit(**options, cut=True).weight_N
    for part in (slice(0, 4), slice(4, 5), slice(5, 8)):
        torch.testing.assert_close(cut_N[part], plain_N[part] * slow_suffix(GAP[part]))


@pytest.mark.parametrize("kind", ["recent", "both"])
@pytest.mark.parametrize("quantile", [0.0, 0.5])
def test_a_weighted_mean_has_credit_of_mean_one_whatever_the_length(
    kind: str, quantile: float
) -> None:
    options = {"kind": "lambda_trace", "trace": kind, "entropy_quantile": quantile}
    options["args"] = {"weighted_mean": True}
    found = credit(**options)
    assert AXIS.mean(found.gradient_weight_N).tolist() == pytest.approx([1, 1, 0, 1])
    ones_N = torch.ones_like(X)
    equal = CreditInputs(ones_N, GAP, AXIS, ones_N, COUNTS, LOGPROBS, LOGPROBS)
    traced = CREDITS.rule(CreditConfig(**options))(equal)
    assert traced.log_ratio_N.tolist() == pytest.approx([1] * 8)


def test_gamma_and_lambda_enter_as_a_product() -> None:
    one = credit(kind="lambda_trace", gamma=0.9, lambda_=0.5)
    other = credit(kind="lambda_trace", gamma=0.5, lambda_=0.9)
    assert torch.equal(one.log_ratio_N, other.log_ratio_N)


def test_selective_traces_give_no_credit_to_certain_tokens() -> None:
    found = credit(kind="lambda_trace", entropy_quantile=0.5)
    entropy = X.abs()[:4]
    certain = entropy < entropy.sort().values[2]
    assert (found.gradient_weight_N[:4] == 0).tolist() == certain.tolist()


def test_missing_inputs_are_named() -> None:
    nothing = CreditInputs(X, GAP, AXIS, None, None, LOGPROBS, LOGPROBS)
    with pytest.raises(ValueError, match="entropy_N"):
        CREDITS.rule(CreditConfig("lambda_trace", entropy_quantile=0.5))(nothing)
    with pytest.raises(ValueError, match="chosen_N"):
        CREDITS.rule(CreditConfig("top_entropy"))(nothing)
    with pytest.raises(ValueError, match="prefix_counts_N"):
        CREDITS.rule(CreditConfig("prefix_sets"))(nothing)


def test_rare_tokens_weigh_less_under_ar_and_without_alpha_all_weigh_one() -> None:
    assert credit(kind="probability", args={"alpha": 0.0}).weight_N.tolist() == [1] * 8
    found_N = credit(kind="probability", args={"alpha": 0.3}).weight_N
    assert (found_N >= 0.7).all()
    pi_old_N = (LOGPROBS - X).exp()  # by pi_old, not pi
    assert found_N.tolist() == pytest.approx([0.3 * p + 0.7 for p in pi_old_N.tolist()])


def test_trgrpos_weight_grows_from_one_to_its_bound_and_is_flat_from_there() -> None:
    logprobs_N = torch.tensor([0.01, 0.25, 0.3, 0.3441, 0.9], dtype=torch.float64).log()
    axis = PackedAxis(torch.tensor([5]))
    inputs = CreditInputs(0 * logprobs_N, 0 * logprobs_N, axis, None, None, logprobs_N, logprobs_N)
    weights = CREDITS.rule(CreditConfig("probability_sigmoid"))(inputs).weight_N.tolist()
    assert weights == pytest.approx([1, 1, 2 / (1 + math.exp(-0.45)), 1.4, 1.4], abs=1e-3)
