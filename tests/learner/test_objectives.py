"""Objectives: tables of four tokens by hand, and which tokens keep a gradient."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from common.config.algorithm import ObjectiveConfig
from learner.algorithm.objectives import OBJECTIVES, batch_scale, uses_ratio
from learner.algorithm.surrogates import LOG_RATIO_LIMIT, Surrogate, Terms, bounded_exp
from learner.algorithm.traces import PackedAxis

RATIOS = torch.tensor([2.0, 1.1, 0.9, 0.5], dtype=torch.float64)
LOGPROBS = torch.tensor([-1.0, -2.0, -3.0, -4.0], dtype=torch.float64)


def surrogate(
    kind: str,
    advantage: float,
    ratios: torch.Tensor = RATIOS,
    chosen: tuple[bool, ...] = (False,) * 4,
    **clip: Any,
) -> tuple[Surrogate, torch.Tensor]:
    """One completion of four tokens, and the gradient of its sum in the log-ratios."""
    log_ratio_N = ratios.log().requires_grad_()
    advantages_B = torch.tensor([advantage], dtype=torch.float64)
    axis = PackedAxis(torch.tensor([4]))
    chosen_N = torch.tensor(chosen)
    zeros_N = torch.zeros_like(LOGPROBS)
    terms = Terms(log_ratio_N, LOGPROBS, advantages_B, axis, zeros_N, chosen_N=chosen_N)
    found = OBJECTIVES.rule(ObjectiveConfig(kind=kind, **clip))(terms)
    return found, torch.autograd.grad(found.values_N.sum(), log_ratio_N)[0]


def test_ppo_clips_only_the_pessimistic_side() -> None:
    good, grad_N = surrogate("ppo", 1.0)
    assert good.values_N.tolist() == pytest.approx([1.2, 1.1, 0.9, 0.5])
    assert good.clipped_N.tolist() == [True, False, False, False]
    assert grad_N.tolist() == pytest.approx([0, 1.1, 0.9, 0.5])
    bad, grad_N = surrogate("ppo", -1.0)
    assert bad.values_N.tolist() == pytest.approx([-2.0, -1.1, -0.9, -0.8])
    assert bad.clipped_N.tolist() == [False, False, False, True]
    assert grad_N.tolist() == pytest.approx([-2.0, -1.1, -0.9, 0])


def test_clip_higher_moves_one_bound() -> None:
    found, _ = surrogate("ppo", 1.0, clip_low=0.2, clip_high=0.5)
    assert found.values_N.tolist() == pytest.approx([1.5, 1.1, 0.9, 0.5])
    assert not surrogate("ppo", 0.0)[0].clipped_N.any()


def test_gspo_is_the_geometric_mean_ratio() -> None:
    s = math.prod(RATIOS.tolist()) ** 0.25
    found, grad_N = surrogate("gspo", 2.0)
    assert found.values_N.tolist() == pytest.approx([2 * s] * 4)
    assert grad_N.tolist() == pytest.approx([2 * s] * 4)  # four copies of 2 s / 4 each
    clipped, grad_N = surrogate("gspo", -2.0, clip_low=4e-4, clip_high=3e-4)
    assert clipped.values_N.tolist() == pytest.approx([-2 * (1 - 4e-4)] * 4)
    assert clipped.clipped_N.all()
    assert not grad_N.any()


def test_gmpo_clips_each_token_on_one_side() -> None:
    high = math.exp(0.4)
    found, grad_N = surrogate("gmpo", 1.0, clip_low=0.4, clip_high=0.4)
    value = (high * 1.1 * 0.9 * 0.5) ** 0.25
    assert found.values_N.tolist() == pytest.approx([value] * 4)
    assert found.clipped_N.tolist() == [True, False, False, False]
    assert grad_N.tolist() == pytest.approx([0, value, value, value])
    found, _ = surrogate("gmpo", -1.0, clip_low=0.4, clip_high=0.4)
    assert found.values_N[0].item() == pytest.approx(-((2 * 1.1 * 0.9 / high) ** 0.25))
    assert not surrogate("gmpo", 0.0)[0].values_N.any()


def test_cispo_keeps_every_gradient() -> None:
    found, grad_N = surrogate("cispo", 2.0, clip_low=0.3, clip_high=0.2)
    bounded = [1.2, 1.1, 0.9, 0.7]
    assert found.values_N.tolist() == pytest.approx([-2.4, -4.4, -5.4, -5.6])
    assert grad_N.tolist() == pytest.approx([2 * ratio for ratio in bounded])
    assert found.clipped_N.tolist() == [True, False, False, True]
    unbounded_below, _ = surrogate("cispo", 2.0, clip_low=1.0)
    assert unbounded_below.clipped_N.tolist() == [True, False, False, False]


def test_gpg_is_reinforce() -> None:
    found, grad_N = surrogate("gpg", 2.0)
    assert found.values_N.tolist() == [-2, -4, -6, -8]
    assert grad_N.tolist() == [2, 2, 2, 2]
    assert not found.clipped_N.any()


@pytest.mark.parametrize("kind", sorted(OBJECTIVES.rules))
@pytest.mark.parametrize("advantage", [-1.5, 0.0, 2.0])
def test_on_policy_all_are_the_policy_gradient(kind: str, advantage: float) -> None:
    _, grad_N = surrogate(kind, advantage, torch.ones_like(RATIOS))
    assert grad_N.tolist() == pytest.approx([advantage] * 4)


def test_a_dual_clip_bounds_what_a_bad_answer_can_cost() -> None:
    """c = 1.5: at ratio 2 and A = -1 the surrogate is -1.5 and has no gradient."""
    found, grad_N = surrogate("ppo", -1.0, args={"dual_clip": 1.5})
    assert found.values_N.tolist() == pytest.approx([-1.5, -1.1, -0.9, -0.8])
    assert grad_N.tolist() == pytest.approx([0, -1.1, -0.9, 0])
    assert found.clipped_N.tolist() == [True, False, False, True]
    good, _ = surrogate("ppo", 1.0, args={"dual_clip": 1.5})
    assert torch.equal(good.values_N, surrogate("ppo", 1.0)[0].values_N)


@pytest.mark.parametrize("advantage", [-2.0, 0.5])
def test_a_dual_clip_is_trls_bound_on_the_ratio(advantage: float) -> None:
    """min(r, delta) inside the free term is the same for delta >= 1 + high."""
    found, _ = surrogate("ppo", advantage, args={"dual_clip": 1.5})
    capped_N = RATIOS.clamp(max=1.5) * advantage
    clipped_N = RATIOS.clamp(0.8, 1.2) * advantage
    assert torch.equal(found.values_N, torch.minimum(capped_N, clipped_N))


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_sapo_has_slope_one_at_the_anchor_and_none_far_off(advantage: float) -> None:
    """d f / d log r = 4 s (1 - s) r with s = sigmoid(tau (r - 1))."""
    _, grad_N = surrogate("sapo", advantage)
    tau = 1.0 if advantage > 0 else 1.05
    gate_N = torch.sigmoid(tau * (RATIOS - 1))
    assert torch.allclose(grad_N, 4 * gate_N * (1 - gate_N) * RATIOS * advantage)
    _, far_N = surrogate("sapo", advantage, torch.full_like(RATIOS, 40.0))
    assert far_N.abs().max() < 1e-9


def test_dppo_goes_by_probability_not_by_ratio() -> None:
    """Policy e^-1 = 0.368 at ratio 2: its anchor is 0.184. The rare tokens moved little."""
    found, grad_N = surrogate("dppo", 1.0, clip_low=0.15, clip_high=0.15)
    assert found.clipped_N.tolist() == [True, False, False, False]
    assert grad_N.tolist() == pytest.approx([0, 1.1, 0.9, 0.5])
    bad, grad_N = surrogate("dppo", -1.0, clip_low=0.015, clip_high=0.0)
    # down from e^-4 / 0.5 = 0.0366 by 0.0183; up is free for a negative advantage
    assert bad.clipped_N.tolist() == [False, False, False, True]
    assert grad_N.tolist() == pytest.approx([-2, -1.1, -0.9, 0])
    free, _ = surrogate("dppo", 1.0, clip_high=math.inf, args={"ratio_cap": 1.05})
    assert not free.clipped_N.any()
    _, capped_N = surrogate("dppo", 1.0, clip_high=math.inf, args={"ratio_cap": 1.05})
    assert capped_N.tolist() == pytest.approx([1.05, 1.05, 0.9, 0.5])


def test_vespos_weight_is_one_at_the_anchor_and_highest_at_power_over_decay() -> None:
    def weight(whole: float, advantage: float) -> float:
        ratios = torch.tensor([whole, 1, 1, 1], dtype=torch.float64)
        return float(surrogate("vespo", advantage, ratios)[1][1]) / advantage

    assert weight(1.0, 1.0) == pytest.approx(1)
    assert weight(2 / 3, 1.0) == pytest.approx(1.208, abs=1e-3)
    assert weight(1.5, -1.0) == pytest.approx(1.242, abs=1e-3)
    assert weight(0.7, 1.0) < weight(2 / 3, 1.0) > weight(0.6, 1.0)
    assert weight(1e6, 1.0) == 0


def test_dro_holds_the_policy_back_by_the_log_ratio() -> None:
    _, grad_N = surrogate("dro", 1.0, args={"tau": 0.5})
    assert torch.allclose(grad_N, 1 - 0.5 * RATIOS.log())


CHOSEN = (True, False, False, True)


def test_clip_cov_takes_the_gradient_of_what_was_drawn_and_is_ppo_elsewhere() -> None:
    found, grad_N = surrogate("clip_cov", 1.0, chosen=CHOSEN)
    plain, plain_N = surrogate("ppo", 1.0)
    assert grad_N.tolist() == [0, plain_N[1], plain_N[2], 0]
    assert found.values_N.tolist() == [0, plain.values_N[1], plain.values_N[2], 0]
    assert torch.equal(surrogate("clip_cov", 1.0)[0].values_N, plain.values_N)


def test_kl_cov_holds_the_chosen_back_by_their_log_ratio() -> None:
    found, grad_N = surrogate("kl_cov", 1.0, chosen=CHOSEN, args={"coefficient": 0.5})
    log2 = math.log(2)
    assert found.values_N.tolist() == pytest.approx([2 - log2 / 2, 1.1, 0.9, 0.5 - log2 / 2])
    assert grad_N.tolist() == pytest.approx([2 - 0.5, 1.1, 0.9, 0.5 + 0.5])


def test_only_the_plain_policy_gradient_does_nothing_with_the_ratio() -> None:
    idle = {kind for kind in OBJECTIVES.rules if not uses_ratio(ObjectiveConfig(kind=kind))}
    assert idle == {"gpg"}


def test_gpg_alpha() -> None:
    advantages = torch.tensor([0.0, 0.5, -0.5, 0.0])
    apart = torch.arange(4)
    assert batch_scale("gpg", advantages, apart) == 2.0
    assert batch_scale("gpg", advantages * 0, apart) == 4.0
    assert batch_scale("ppo", advantages, apart) == 1.0


def test_gpg_alpha_counts_groups_as_the_papers_code_does() -> None:
    """Rewards 0, 0.5, 1: the middle one has no advantage and belongs to a group that has."""
    advantages = torch.tensor([-0.5, 0.0, 0.5, 0.0, 0.0, 0.0])
    assert batch_scale("gpg", advantages, torch.tensor([0, 0, 0, 1, 1, 1])) == 2.0


def test_bounded_exp() -> None:
    x = torch.tensor([-3000.0, -80.0, 0.5, 80.0, 3000.0], requires_grad=True)
    y = bounded_exp(x)
    limit, half = math.exp(LOG_RATIO_LIMIT), math.exp(0.5)
    assert y.tolist() == pytest.approx([0, math.exp(-80), half, 61 * limit, 2981 * limit])
    grad = torch.autograd.grad(y.sum(), x)[0]
    assert grad.tolist() == pytest.approx([0, math.exp(-80), half, limit, limit])


def guided(quantile: float, elsewhere: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and gradients of Guide's objective at RATIOS, all of the gap before the first step."""
    x = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    terms = Terms(
        x,
        LOGPROBS,
        torch.tensor([2.0], dtype=torch.float64),
        PackedAxis(torch.tensor([4])),
        torch.zeros_like(LOGPROBS),
        elsewhere_gap_N=RATIOS.log() if elsewhere else None,
        elsewhere_B=torch.tensor([True]) if elsewhere else None,
    )
    config = ObjectiveConfig(kind="guide", args={"gamma_quantile": quantile})
    found = OBJECTIVES.rule(config)(terms)
    return found.values_N, torch.autograd.grad(found.values_N.sum(), x)[0]


OLD = torch.tensor([0.01, 0.1, 0.5, 1.0], dtype=torch.float64)
"""Probabilities before the first update."""


@pytest.mark.parametrize("gamma", [0.0, 0.1, 0.9])
def test_rgr_divides_a_probability_by_the_old_one_and_gamma(gamma: float) -> None:
    """A pi / (pi_old + gamma), in which the prompt that it was sampled behind has no part."""
    x = torch.tensor([0.5, -0.5, 0.2, 0.0], dtype=torch.float64, requires_grad=True)
    config = ObjectiveConfig(kind="rgr", args={"gamma": gamma})
    terms = Terms(
        x,
        OLD.log() + x.detach(),
        torch.tensor([2.0], dtype=torch.float64),
        PackedAxis(torch.tensor([4])),
        torch.zeros_like(OLD),
        anchor_logprobs_N=OLD.log(),
        elsewhere_gap_N=torch.full_like(OLD, -3.0),
        elsewhere_B=torch.tensor([True]),
    )
    found = OBJECTIVES.rule(config)(terms)
    wanted = 2.0 * OLD * x.detach().exp() / (OLD + gamma)
    assert found.values_N.tolist() == pytest.approx(wanted.tolist(), rel=1e-12)
    slope = torch.autograd.grad(found.values_N.sum(), x)[0]  # of pi, by log pi
    assert slope.tolist() == pytest.approx(wanted.tolist(), rel=1e-12)
    assert not found.clipped_N.any()
    plain = replace(terms, elsewhere_B=None, elsewhere_gap_N=None)
    ppo = OBJECTIVES.rule(ObjectiveConfig(kind="ppo"))(plain)
    assert torch.equal(OBJECTIVES.rule(config)(plain).values_N, ppo.values_N)


def test_rgr_is_finite_where_a_token_was_out_of_the_question() -> None:
    x = torch.zeros(2, requires_grad=True)
    anchor = torch.tensor([-400.0, -1e-9])
    terms = Terms(
        x,
        anchor,
        torch.tensor([1.0]),
        PackedAxis(torch.tensor([2])),
        torch.zeros(2),
        anchor_logprobs_N=anchor,
        elsewhere_gap_N=torch.zeros(2),
        elsewhere_B=torch.tensor([True]),
    )
    found = OBJECTIVES.rule(ObjectiveConfig(kind="rgr"))(terms)
    assert found.values_N.tolist() == pytest.approx([0.0, 1 / 1.1], abs=1e-6)
    assert torch.autograd.grad(found.values_N.sum(), x)[0].isfinite().all()


def test_guide_shapes_what_was_sampled_behind_a_hint_and_is_ppo_elsewhere() -> None:
    gamma = 0.9 + 0.5 * (1.1 - 0.9)  # the median of the four
    values_N, grad_N = guided(0.5)
    expected = 2.0 * RATIOS / (RATIOS + gamma)
    assert values_N.tolist() == pytest.approx(expected.tolist())
    slope = 2.0 * gamma * RATIOS / (RATIOS + gamma) ** 2
    assert grad_N.tolist() == pytest.approx(slope.tolist())
    assert bool((grad_N <= 2.0 / 4 + 1e-12).all())
    plain_N, plain_grad_N = guided(0.5, elsewhere=False)
    assert plain_N.tolist() == [2.0] * 4
    assert plain_grad_N.tolist() == [2.0] * 4
