"""Off-policy corrections: tables by hand, bounds, and what they expect of unsampled tokens."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from maths_oracles import normal, random, seeds

from common.config.algorithm import CorrectionConfig
from learner.algorithm.corrections import CORRECTIONS, behaviour_gap, correct
from learner.algorithm.traces import PackedAxis

RATIOS = torch.tensor([4.0, 1.0, 0.25, 0.8, 1.5], dtype=torch.float64)
AXIS = PackedAxis(torch.tensor([3, 0, 2]))


def weights(kind: str, sampled=None, advantages=(1.0, 0.0, -1.0), **options) -> list[float]:
    sampled_N = torch.ones(5, dtype=torch.bool) if sampled is None else torch.tensor(sampled)
    gap_N = RATIOS.log().masked_fill(~sampled_N, 0.0)
    signs_N = AXIS.spread(torch.tensor(advantages, dtype=torch.float64))
    config = CorrectionConfig(kind, **options)
    return correct(gap_N, sampled_N, AXIS, signs_N, config).weight_N.tolist()


def test_token_level_by_hand() -> None:
    assert weights("none") == [1] * 5
    assert weights("tis", cap=2.0) == pytest.approx([2, 1, 0.25, 0.8, 1.5])
    assert weights("icepop", args={"low": 0.5, "high": 2.0}) == pytest.approx([0, 1, 0, 0.8, 1.5])


def test_sequence_level_by_hand() -> None:
    """Products: 4 * 1 * 0.25 = 1 and 0.8 * 1.5 = 1.2."""
    assert weights("tis", level="sequence") == pytest.approx([1, 1, 1, 1.2, 1.2])
    assert weights("icepop", level="sequence", args={"high": 1.1}) == pytest.approx([1, 1, 1, 0, 0])


def test_icepops_band_is_its_own_whatever_the_cap_of_tis() -> None:
    """[0.5, 5], as IcePop publishes it: 4 stays and 0.25 goes, also under a cap of 2."""
    assert weights("icepop", cap=2.0) == pytest.approx([4, 1, 0, 0.8, 1.5])


def test_completions_are_left_out_by_the_ratio_of_the_whole() -> None:
    """Products 1 and 1.2, geometric means 1 and sqrt(1.2) = 1.095."""
    by_product = weights("sequence_mask", args={"high": 1.1})
    assert by_product == pytest.approx([4, 1, 0.25, 0, 0])
    assert weights("sequence_mask", args={"high": 1.1, "measure": "geometric"}) == pytest.approx(
        [4, 1, 0.25, 0.8, 1.5]
    )
    rejection = weights("sequence_mask", args={"low": 1.1, "weigh": False})
    assert rejection == [0, 0, 0, 1, 1]
    assert weights("sequence_mask", level="sequence") == pytest.approx([1, 1, 1, 1.2, 1.2])


def test_a_bad_answer_that_the_policy_has_left_teaches_nothing_more() -> None:
    """mean log mu - log pi_old: 0 and -0.09; the sign of the advantage decides."""
    assert weights("off_policy_mask", advantages=(-1.0, 0, -1.0)) == [1] * 5
    left = {"gap": 0.0}
    assert weights("off_policy_mask", advantages=(1.0, 0, 1.0), args=left) == [1] * 5
    gap_N = torch.tensor([-1.0, -1.0, -1.0, 1.0, 1.0], dtype=torch.float64)
    signs_N = torch.tensor([-1.0] * 5, dtype=torch.float64)
    config = CorrectionConfig("off_policy_mask")
    found_N = correct(gap_N, torch.ones(5, dtype=torch.bool), AXIS, signs_N, config).weight_N
    assert found_N.tolist() == [0, 0, 0, 1, 1]


def test_topr_tapers_what_is_not_good() -> None:
    assert weights("topr", advantages=(1.0, 0.0, -1.0)) == pytest.approx([1, 1, 1, 0.8, 1])
    assert weights("topr", advantages=(0.0, 0.0, 1.0)) == pytest.approx([1, 1, 0.25, 1, 1])


def test_m2po_leaves_out_what_was_chosen_and_no_guidance() -> None:
    chosen_N = torch.tensor([True, False, True, False, False])
    sampled_N = torch.tensor([True, True, False, True, True])
    config = CorrectionConfig("m2po")
    found = correct(RATIOS.log(), sampled_N, AXIS, torch.ones(5), config, chosen_N)
    assert found.weight_N.tolist() == [0, 1, 1, 1, 1]


def test_unsampled_tokens_have_weight_one_and_no_part_in_products() -> None:
    sampled = [True, True, False, True, True]
    assert weights("tis", sampled, cap=2.0) == pytest.approx([2, 1, 1, 0.8, 1.5])
    assert weights("tis", sampled, level="sequence", cap=9.0) == pytest.approx([4, 4, 1, 1.2, 1.2])
    assert weights("icepop", [False] * 5) == [1] * 5


def test_gap_of_unsampled_tokens_is_zero_and_detached() -> None:
    old_N = torch.tensor([-1.0, -2.0], requires_grad=True)
    gap_N = behaviour_gap(old_N, torch.tensor([-1.5, float("nan")]))
    assert gap_N.tolist() == [0.5, 0.0]
    assert not gap_N.requires_grad


@given(seeds, st.sampled_from(sorted(CORRECTIONS.rules)), st.sampled_from(["token", "sequence"]))
@settings(max_examples=30, deadline=None)
def test_on_policy_is_one_and_off_policy_is_bounded(seed: int, kind: str, level: str) -> None:
    config = CorrectionConfig(kind, level=level, cap=5.0)
    sampled_N = torch.ones(5, dtype=torch.bool)
    signs_N = normal(5, random(seed + 1))
    none_N = torch.zeros(5, dtype=torch.bool)
    on_policy = correct(torch.zeros(5), sampled_N, AXIS, signs_N, config, none_N).weight_N
    assert on_policy.tolist() == [1] * 5
    wild_N = normal(5, random(seed), 100.0)
    off_policy = correct(wild_N, sampled_N, AXIS, signs_N, config, wild_N.abs() > 1).weight_N
    assert (off_policy >= 0).all()
    assert off_policy.isfinite().all()
    if (kind, level) != ("sequence_mask", "token"):  # which bounds the completion's ratio alone
        assert (off_policy <= 5).all()


@given(seeds)
@settings(max_examples=5, deadline=None)
def test_tis_is_unbiased_below_its_cap(seed: int) -> None:
    """sum_o mu(o) w(o) f(o) = sum_o pi_old(o) f(o) over a vocabulary, exactly."""
    generator = random(seed)
    old_V, mu_V = (normal(5, generator, 0.2).log_softmax(0) for _ in range(2))
    every_V = torch.ones(5, dtype=torch.bool)
    config = CorrectionConfig("tis", cap=10.0)
    weight_V = correct(old_V - mu_V, every_V, AXIS, torch.ones(5), config).weight_N
    f_V = normal(5, generator)
    torch.testing.assert_close((mu_V.exp() * weight_V * f_V).sum(), (old_V.exp() * f_V).sum())
