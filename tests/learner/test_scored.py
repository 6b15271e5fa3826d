"""Credit from a scorer: identities in float64, and an enumeration."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from maths_oracles import algorithm
from torch import Tensor

from learner.algorithm.prepared import Prepared
from learner.algorithm.recipe import Recipe
from learner.algorithm.rewarded import Rewarded, StepTokens
from learner.algorithm.traces import PackedAxis

LENGTHS = [3, 1, 4, 2]
GROUPS = torch.tensor([0, 0, 1, 1])
REWARDS = torch.tensor([1.0, 0.0, 1.0, 0.25], dtype=torch.float64)
AXIS = PackedAxis(torch.tensor(LENGTHS))


def tokens(scores_N: Tensor | None = None, seed: int = 0) -> StepTokens:
    torch.manual_seed(seed)
    total = sum(LENGTHS)
    sampler_N = -torch.rand(total) * 3
    ids_N = torch.randint(9, (total,))
    scores_N = sampler_N.clone() if scores_N is None else scores_N
    return StepTokens(
        AXIS, ids_N, torch.ones(total, dtype=torch.bool), sampler_N, scores_N=scores_N
    )


def prepared(
    given: StepTokens, rewards_B: Tensor = REWARDS, step: int = 0, **advantage: Any
) -> Prepared:
    config = algorithm(advantage={"scorer": "teacher", **advantage} if advantage else {})
    lengths_B = given.axis.sum(given.loss_mask_N).long()
    rewarded = Rewarded(rewards_B, GROUPS, lengths_B, tokens=given, step=step)
    return Recipe(config, "none", 40).prepare(rewarded)


def of_tokens(found: Prepared) -> Tensor:
    assert found.advantages_N is not None
    return found.advantages_N


def test_a_teacher_that_is_the_policy_teaches_nothing() -> None:
    found = prepared(tokens(), kind="distill")
    assert of_tokens(found).abs().sum() == 0
    assert not found.trained_B.any()


def test_without_a_coefficient_and_with_rewards_it_is_grpo_bitwise() -> None:
    plain_N = AXIS.spread(prepared(tokens()).advantages_B)
    scored = tokens(-torch.rand(sum(LENGTHS)))
    for kind, args in (
        ("distill", {"coefficient": 0.0, "reward_weight": 1.0}),
        ("flow", {"beta": 1e300}),
    ):
        assert torch.equal(of_tokens(prepared(scored, kind=kind, args=args)), plain_N)
    assert torch.equal(of_tokens(prepared(tokens(), kind="flow")), plain_N)


def test_a_uniform_group_learns_from_a_teacher() -> None:
    found = prepared(tokens(-torch.rand(sum(LENGTHS))), torch.ones_like(REWARDS), kind="distill")
    assert found.advantages_B.abs().sum() == 0
    assert found.trained_B.all()


def test_softening_bounds_what_a_rejected_token_loses_and_is_off_at_one() -> None:
    rejected = tokens(torch.full((sum(LENGTHS),), -500.0))
    plain_N = of_tokens(prepared(rejected, kind="distill"))
    off_N = of_tokens(prepared(rejected, kind="distill", args={"proximal": 1.0}))
    assert torch.equal(plain_N, off_N) and plain_N.max() < -400
    soft_N = of_tokens(prepared(rejected, kind="distill", args={"proximal": 0.75}))
    assert torch.allclose(soft_N, torch.full_like(soft_N, math.log(0.25)))
    ratio = tokens()
    higher = replace(ratio, scores_N=ratio.behaviour_logprobs_N + math.log(3.0))
    soft_N = of_tokens(prepared(higher, kind="distill", args={"proximal": 0.5}))
    assert soft_N.tolist() == pytest.approx([math.log(0.5 * 3 + 0.5)] * len(soft_N), rel=1e-6)
    none_N = of_tokens(prepared(higher, kind="distill", args={"proximal": 0.0}))
    assert none_N.abs().sum() == 0


def test_its_gradient_is_that_of_the_divergence_from_the_teacher() -> None:
    """Enumerated over all tokens of one step, each a completion of its probability."""
    torch.manual_seed(1)
    logits = torch.randn(5, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(5, dtype=torch.float64).log_softmax(0)
    logprobs = logits.log_softmax(0)
    axis = PackedAxis(torch.ones(5, dtype=torch.long))
    every = StepTokens(
        axis,
        torch.arange(5),
        torch.ones(5, dtype=torch.bool),
        logprobs.detach(),
        scores_N=teacher,
    )
    config = algorithm(advantage={"kind": "distill", "scorer": "teacher"})
    given = Rewarded(torch.zeros(5).double(), torch.zeros(5).long(), axis.lengths_B, tokens=every)
    a_N = of_tokens(Recipe(config, "none", 40).prepare(given))
    (found,) = torch.autograd.grad((logprobs.detach().exp() * a_N * logprobs).sum(), logits)
    divergence = (logits.softmax(0) * (logits.log_softmax(0) - teacher)).sum()
    (expected,) = torch.autograd.grad(divergence, logits)
    assert torch.allclose(found, -expected, atol=1e-12)


def test_flow_without_its_head_has_the_gradient_of_its_squared_residuals() -> None:
    """Against autograd of (log Z + m_i - beta R_i)^2, log Z the best one of each group."""
    torch.manual_seed(2)
    beta, total = 15.0, sum(LENGTHS)
    logprobs_N = (-torch.rand(total).double() * 2).requires_grad_()
    reference_N = -torch.rand(total).double() * 2
    given = StepTokens(
        AXIS,
        torch.arange(total),
        torch.ones(total, dtype=torch.bool),
        logprobs_N.detach(),
        scores_N=reference_N,
    )
    found = prepared(given, kind="flow", args={"beta": beta})
    mean_B = AXIS.mean(of_tokens(found) * logprobs_N)
    (mine,) = torch.autograd.grad(2 * beta * mean_B.sum(), logprobs_N)
    rest_B = AXIS.mean(logprobs_N - reference_N) - beta * found.advantages_B
    pairs = rest_B.view(2, 2)
    best_Z = -pairs.mean(1, keepdim=True).detach()
    (theirs,) = torch.autograd.grad(((best_Z + pairs) ** 2).sum(), logprobs_N)
    assert torch.allclose(mine, -theirs, atol=1e-10)


def test_given_tokens_have_no_ratio() -> None:
    """Their log-probability under the sampler is NaN, and a mean of the rest is not touched."""
    own = tokens(-torch.rand(sum(LENGTHS)))
    given_N = torch.zeros(sum(LENGTHS), dtype=torch.bool)
    given_N[1] = True
    holed = replace(
        own,
        behaviour_logprobs_N=own.behaviour_logprobs_N.masked_fill(given_N, math.nan),
        loss_mask_N=~given_N,
    )
    for kind in ("distill", "flow"):
        a_N = of_tokens(prepared(holed, kind=kind))
        assert a_N.isfinite().all()
    distilled = of_tokens(prepared(holed, kind="distill"))
    assert distilled[1] == 0.0
    assert torch.equal(distilled[2:], of_tokens(prepared(own, kind="distill"))[2:])


def test_evidence_is_grpo_without_a_mix_or_without_a_difference_bitwise() -> None:
    plain_N = AXIS.spread(prepared(tokens()).advantages_B)
    scored = tokens(-torch.rand(sum(LENGTHS)))
    off = of_tokens(prepared(scored, kind="evidence", args={"mix": 0.0}))
    assert torch.equal(off, plain_N)
    assert torch.equal(of_tokens(prepared(tokens(), kind="evidence")), plain_N)


@pytest.mark.parametrize(("mix", "bound"), [(0.5, 0.2), (1.0, 0.9), (1.0, 1.0)])
def test_evidence_never_changes_a_sign_and_stays_within_its_bound(mix: float, bound: float) -> None:
    plain_N = AXIS.spread(prepared(tokens()).advantages_B)
    apart = tokens(-torch.rand(sum(LENGTHS)) * 40)
    found_N = of_tokens(prepared(apart, kind="evidence", args={"mix": mix, "bound": bound}))
    weights_N = found_N / plain_N
    assert weights_N.min() >= 1 - mix * bound - 1e-12
    assert weights_N.max() <= 1 + mix * bound + 1e-12
    assert len(weights_N.unique()) > 1
    if mix * bound < 1:
        assert torch.equal(found_N.sign(), plain_N.sign())


def test_evidence_gives_more_where_the_scorer_agrees_with_the_verifier() -> None:
    """By hand: the scorer finds a token e times likelier, once where A > 0 and once where A < 0."""
    own = tokens()
    likelier = own.behaviour_logprobs_N.clone()
    likelier[0] += 0.1  # of a right completion
    likelier[3] += 0.1  # of a wrong one
    given = replace(own, scores_N=likelier)
    plain_N = AXIS.spread(prepared(tokens()).advantages_B)
    found_N = of_tokens(prepared(given, kind="evidence"))
    assert float(found_N[0] / plain_N[0]) == pytest.approx(0.5 + 0.5 * math.exp(0.1), rel=1e-6)
    assert float(found_N[3] / plain_N[3]) == pytest.approx(0.5 + 0.5 * math.exp(-0.1), rel=1e-6)


def test_the_mix_of_evidence_falls_in_a_line_to_grpo() -> None:
    """The weight of step s is that of a constant mix times 1 - s / 50; from step 50 on it is 1."""
    scored = tokens(-torch.rand(sum(LENGTHS)) * 4)
    plain_N = AXIS.spread(prepared(tokens()).advantages_B)
    kept_N = of_tokens(prepared(scored, kind="evidence"))
    for step in (0, 1, 25, 49, 50, 51, 1000):
        args = {"mix": 0.5, "decay_steps": 50}
        found_N = of_tokens(prepared(scored, step=step, kind="evidence", args=args))
        left = 0.5 * max(0.0, 1 - step / 50)
        expected = of_tokens(prepared(scored, kind="evidence", args={"mix": left}))
        assert torch.equal(found_N, expected)
        assert torch.equal(found_N, plain_N) == (step >= 50)
        assert torch.equal(found_N, kept_N) == (step == 0)
        assert torch.equal(of_tokens(prepared(scored, step=step, kind="evidence")), kept_N)


def test_scores_are_compared_with_the_policy_where_it_has_scored() -> None:
    """A sampler that is off by a nat has no part in it."""
    scores_N = -torch.rand(sum(LENGTHS))
    own = tokens(scores_N)
    shifted = replace(
        own, own_N=own.behaviour_logprobs_N, behaviour_logprobs_N=own.behaviour_logprobs_N - 1.0
    )
    expected = of_tokens(prepared(own, kind="distill"))
    assert torch.equal(of_tokens(prepared(shifted, kind="distill")), expected)


def test_progress_is_grpo_at_the_reference_and_measured_among_those_still_running() -> None:
    plain_N = AXIS.spread(prepared(tokens()).advantages_B)
    assert torch.equal(of_tokens(prepared(tokens(), kind="reference_progress")), plain_N)
    own = tokens(seed=3)
    given = replace(own, scores_N=own.behaviour_logprobs_N - torch.arange(10.0))
    found_N = of_tokens(prepared(given, kind="reference_progress", args={"coefficient": 1.0}))
    extra = (found_N - plain_N).split(LENGTHS)
    # Steps away are 0, 1, 2 and 3 in the first group: sums 0, 1, 3 and 3. At the first place the
    # mean is 1.5, behind it the long one is alone.
    assert extra[0].tolist() == pytest.approx([-1.5, 0.0, 0.0], abs=1e-5)
    assert extra[1].tolist() == pytest.approx([1.5], abs=1e-5)


def test_a_completion_that_nobody_could_score_is_compared_with_and_not_trained_on() -> None:
    scores_N = -torch.rand(sum(LENGTHS))
    scores_N[3] = math.nan
    given = tokens(scores_N)
    config = algorithm(advantage={"kind": "evidence", "scorer": "teacher"})
    lengths_B = given.axis.sum(given.loss_mask_N).long()
    scored_B = torch.tensor([True, False, True, True])
    rewarded = Rewarded(REWARDS, GROUPS, lengths_B, tokens=given, scored_B=scored_B)
    found = Recipe(config, "none", 40).prepare(rewarded)
    assert found.trained_B.tolist() == scored_B.tolist()
    assert found.token_weights_B[1] == 0.0
    plain_B = prepared(tokens()).advantages_B
    assert torch.equal(found.advantages_B[[0, 2, 3]], plain_B[[0, 2, 3]])
    assert of_tokens(found).isfinite().all()
