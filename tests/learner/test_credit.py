"""Credit: the interface of trace, weight and prefix shares to the objective."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from maths_oracles import decays, dense_kernel, normal, random

from common.config.algorithm import CreditConfig
from learner.algorithm.credit import CREDITS, Credit, CreditInputs
from learner.algorithm.traces import PackedAxis

AXIS = PackedAxis(torch.tensor([4, 1, 0, 3]))
X = normal(8, random(0))
GAP = normal(8, random(1), 0.5)
COUNTS = torch.tensor([4.0, 2, 1, 1, 4, 4, 2, 1])


def credit(**options) -> Credit:
    config = CreditConfig(**options)
    return CREDITS.rule(config)(CreditInputs(X, GAP, AXIS, X.abs(), COUNTS))


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
    keep_N = GAP.exp().clamp(max=1)
    for part in (slice(0, 4), slice(4, 5), slice(5, 8)):
        size = part.stop - part.start
        kernel = dense_kernel(kind, size, decay, keep_N[part] if cut else None)
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
    nothing = CreditInputs(X, GAP, AXIS, None, None)
    with pytest.raises(ValueError, match="entropy_N"):
        CREDITS.rule(CreditConfig("lambda_trace", entropy_quantile=0.5))(nothing)
    with pytest.raises(ValueError, match="prefix_counts_N"):
        CREDITS.rule(CreditConfig("prefix_sets"))(nothing)
