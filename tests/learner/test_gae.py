"""Generalised advantages of a critic's values: identities and an oracle, in float64."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from maths_oracles import algorithm, decays, lengths, normal, random, random_batch, seeds
from torch import Tensor

from common.config.algorithm import AdvantageConfig, CriticConfig
from common.errors import UserError
from learner.algorithm.gae import (
    explained_variance,
    generalised_advantages,
    length_adaptive,
    value_losses,
    whitened,
)
from learner.algorithm.prepared import Prepared
from learner.algorithm.recipe import Recipe
from learner.algorithm.recipe_checks import check_recipe
from learner.algorithm.rewarded import Rewarded, StepTokens, Turns
from learner.algorithm.traces import PackedAxis

# Two episodes: turns of 2 and 3 tokens with two given ones between, and one turn of 4.
TURNS_N = torch.tensor([0, 0, -1, -1, 1, 1, 1, 0, 0, 0, 0])
AXIS = PackedAxis(torch.tensor([7, 4]))
REWARDS = torch.tensor([1.0, 0.25], dtype=torch.float64)


def slow_advantages(
    rewards: list[float], values: list[float], gamma: float, lambda_: float
) -> list[float]:
    """The double sum of the definition, of one completion."""
    values = [*values, 0.0]
    errors = [r + gamma * values[t + 1] - values[t] for t, r in enumerate(rewards)]
    return [
        sum((gamma * lambda_) ** (t - k) * errors[t] for t in range(k, len(errors)))
        for k in range(len(errors))
    ]


@settings(deadline=None)
@given(lengths, decays, st.lists(decays, min_size=7, max_size=7), seeds)
def test_it_is_the_double_sum_of_every_completion(
    sizes: list[int], gamma: float, lambdas: list[float], seed: int
) -> None:
    generator = random(seed)
    rewards_M, values_M = normal(sum(sizes), generator), normal(sum(sizes), generator)
    axis = PackedAxis(torch.tensor(sizes))
    lambda_B = torch.tensor(lambdas[: len(sizes)])
    found_M = generalised_advantages(rewards_M, values_M, axis, gamma, lambda_B)
    parts = zip(rewards_M.split(sizes), values_M.split(sizes), lambda_B.tolist(), strict=True)
    expected = [a for r, v, l_ in parts for a in slow_advantages(r.tolist(), v.tolist(), gamma, l_)]
    expected_M = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(found_M, expected_M, rtol=0, atol=1e-11)


def episodes(values_N: Tensor, rewards_U: list[float] | None = None) -> StepTokens:
    turns = Turns(
        torch.tensor([0, 0, 1]),
        torch.tensor([0, 1, 0]),
        TURNS_N,
        torch.tensor(rewards_U or [0.0] * 3, dtype=torch.float64),
        torch.full((3,), -1),
    )
    given_N = TURNS_N < 0
    sampler_N = torch.full(TURNS_N.shape, -1.0).masked_fill(given_N, math.nan)
    return StepTokens(AXIS, TURNS_N.clone(), ~given_N, sampler_N, turns, values_N=values_N)


def prepared(
    tokens: StepTokens,
    rewards_B: Tensor = REWARDS,
    critic: CriticConfig | None = None,
    **args: Any,
) -> Prepared:
    args = {"whiten": False, **args}
    advantage = {"kind": "gae", "args": args, "critic": critic or CriticConfig()}
    config = algorithm(baseline={"kind": "none"}, advantage=advantage)
    lengths_B = tokens.axis.sum(tokens.loss_mask_N).long()
    rewarded = Rewarded(rewards_B, torch.tensor([0, 0]), lengths_B, tokens=tokens)
    return Recipe(config, "none", 40).prepare(rewarded)


def made_up_values(seed: int = 0) -> Tensor:
    return torch.rand(len(TURNS_N), generator=random(seed))


def of_tokens(found: Prepared) -> tuple[Tensor, Tensor]:
    assert found.advantages_N is not None
    assert found.returns_N is not None
    return found.advantages_N, found.returns_N


def test_with_lambda_one_an_advantage_is_the_reward_less_the_value() -> None:
    """On every sampled token, past the given ones between two turns, whatever those are worth."""
    values_N, sampled_N = made_up_values(), TURNS_N >= 0
    advantages_N, returns_N = of_tokens(prepared(episodes(values_N), lambda_=1.0))
    expected_N = AXIS.spread(REWARDS) - values_N.double()
    torch.testing.assert_close(advantages_N[sampled_N], expected_N[sampled_N], rtol=0, atol=1e-12)
    assert (advantages_N[~sampled_N] == 0).all()
    torch.testing.assert_close(
        returns_N[sampled_N], AXIS.spread(REWARDS)[sampled_N], rtol=0, atol=1e-12
    )
    other_N = torch.where(sampled_N, values_N, 9.0)
    assert torch.equal(of_tokens(prepared(episodes(other_N), lambda_=1.0))[0], advantages_N)


def test_with_lambda_zero_it_is_the_error_of_one_step() -> None:
    values_N = made_up_values()
    critic = CriticConfig(lambda_=0.0)
    found = prepared(episodes(values_N), critic=critic, lambda_=0.0, gamma=0.9)
    advantages_N, returns_N = of_tokens(found)
    v = values_N.double().tolist()
    following = [v[1], v[4], 0, 0, v[5], v[6], 0, v[8], v[9], v[10], 0]  # over the given tokens
    rewards = [0, 0, 0, 0, 0, 0, 1.0, 0, 0, 0, 0.25]
    for t in (TURNS_N >= 0).nonzero()[:, 0].tolist():
        error = rewards[t] + 0.9 * following[t] - v[t]
        assert advantages_N[t] == pytest.approx(error, abs=1e-12)
        assert returns_N[t] == pytest.approx(error + v[t], abs=1e-12)


def test_the_reward_of_a_turn_falls_at_its_last_token() -> None:
    """The first turn earns 0.4 of the episode's 1.0; the second the rest."""
    zeros_N = torch.zeros(len(TURNS_N))
    advantages_N, _ = of_tokens(prepared(episodes(zeros_N, [0.4, 0.0, 0.0]), lambda_=0.0))
    expected = torch.zeros(len(TURNS_N), dtype=torch.float64)
    expected[1], expected[6], expected[10] = 0.4, 0.6, 0.25
    torch.testing.assert_close(advantages_N, expected)
    returns_N = of_tokens(prepared(episodes(zeros_N, [0.4, 0.0, 0.0])))[1]
    torch.testing.assert_close(returns_N[:2], torch.ones(2, dtype=torch.float64))
    torch.testing.assert_close(returns_N[4:7], torch.full((3,), 0.6, dtype=torch.float64))


def test_a_critic_of_zeros_is_reinforce_with_the_reward() -> None:
    found = prepared(episodes(torch.zeros(len(TURNS_N))), lambda_=1.0)
    plain = Recipe(algorithm(baseline={"kind": "none"}), "none", 40)
    tokens = episodes(torch.zeros(len(TURNS_N)))
    rewarded = Rewarded(REWARDS, torch.tensor([0, 0]), torch.tensor([5, 4]), tokens=tokens)
    advantages_B = plain.prepare(rewarded).advantages_B
    sampled_N = TURNS_N >= 0
    assert torch.equal(of_tokens(found)[0][sampled_N], AXIS.spread(advantages_B)[sampled_N])


def test_completions_without_a_reward_teach_nothing_and_stand_in_no_mean() -> None:
    rewards_B = torch.tensor([math.nan, 0.25], dtype=torch.float64)
    found = prepared(episodes(made_up_values()), rewards_B, lambda_=0.9, whiten=True)
    advantages_N, returns_N = of_tokens(found)
    assert advantages_N[:7].abs().sum() == 0 and returns_N.isfinite().all()
    assert found.kept_B.tolist() == [False, True]
    counted_N = advantages_N[7:]
    assert counted_N.mean() == pytest.approx(0, abs=1e-12)
    assert counted_N.std() == pytest.approx(1, rel=1e-6)


def test_the_lambda_of_the_policy_follows_the_length() -> None:
    """VAPO's values at alpha 0.05; a short answer has 0, so that its advantage is one error."""
    found = length_adaptive(torch.tensor([10, 20, 100, 1000, 10000, 0]), 0.05)
    torch.testing.assert_close(
        found, torch.tensor([0, 0, 0.8, 0.98, 0.998, 0], dtype=torch.float64)
    )
    values_N = made_up_values()
    short = of_tokens(prepared(episodes(values_N), length_alpha=0.05, lambda_=0.5))[0]
    assert torch.equal(short, of_tokens(prepared(episodes(values_N), lambda_=0.0))[0])
    long = of_tokens(prepared(episodes(values_N), length_alpha=1.0))[0]
    expected = slow_advantages([0, 0, 0, 0.25], values_N[7:].tolist(), 1.0, 0.75)
    torch.testing.assert_close(long[7:], torch.tensor(expected, dtype=torch.float64))


def test_whitening_needs_two_values() -> None:
    one_N = torch.tensor([3.0, 5.0], dtype=torch.float64)
    assert whitened(one_N, torch.tensor([True, False])).tolist() == [0.0, 0.0]


def test_a_value_that_went_too_far_towards_its_return_has_no_gradient() -> None:
    old_N, returns_N = torch.zeros(4), torch.tensor([1.0, 1.0, -1.0, 1.0])
    values_N = torch.tensor([0.1, 0.5, 0.5, -0.5], requires_grad=True)
    value_losses(values_N, old_N, returns_N, 0.2).sum().backward()
    assert values_N.grad is not None
    torch.testing.assert_close(values_N.grad, torch.tensor([-0.9, 0.0, 1.5, -1.5]))
    free_N = values_N.detach().clone().requires_grad_()
    value_losses(free_N, old_N, returns_N, math.inf).sum().backward()
    torch.testing.assert_close(free_N.grad, free_N.detach() - returns_N)


def test_explained_variance() -> None:
    returns_N = torch.tensor([0.0, 1.0, 0.5, 1.0], dtype=torch.float64)
    assert explained_variance(returns_N, returns_N) == 1.0
    assert explained_variance(torch.full_like(returns_N, 0.3), returns_N) == pytest.approx(0.0)
    assert explained_variance(-returns_N, returns_N) == pytest.approx(-3.0)
    assert explained_variance(returns_N, torch.ones_like(returns_N)) == 0.0


@pytest.mark.parametrize(
    ("axes", "key"),
    [
        ({"baseline": {"kind": "grpo"}}, "baseline.kind=grpo"),
        ({"baseline": {"kind": "none", "min_advantage": -0.1}}, "baseline.min_advantage"),
        ({"rollout": {"dynamic_sampling": True}}, "dynamic_sampling=true"),
        ({"rollout": {"max_variance_share": 0.5}}, "max_variance_share=0.5"),
        ({"rollout": {"prune_rate": 0.5}}, "prune_rate=0.5"),
        ({"objective": {"kind": "gpg"}}, "objective.kind=gpg"),
        ({"objective": {"kind": "gmpo"}}, "objective.kind=gmpo"),
    ],
)
def test_what_drops_completions_for_their_rewards_is_refused(
    axes: dict[str, dict[str, Any]], key: str
) -> None:
    config = algorithm(**{"baseline": {"kind": "none"}, **axes})
    check_recipe(replace(config, advantage=AdvantageConfig()), "none")
    with pytest.raises(UserError, match=key):
        check_recipe(replace(config, advantage=AdvantageConfig(kind="gae")), "none")


def test_the_likelihood_of_right_answers_is_a_mean_over_their_tokens() -> None:
    """Its gradient by autograd, added to the loss without it; other answers have none of it."""
    batch = random_batch(3, [4, 6, 3])
    rewards_B = torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)
    lengths_B = PackedAxis(batch.lengths_B).sum(batch.loss_mask_N).long()
    rewarded = Rewarded(rewards_B, torch.tensor([0, 0, 0]), lengths_B)

    def gradient(weight: float) -> tuple[Tensor, dict[str, tuple[float, float]]]:
        config = algorithm(baseline={"kind": "none"}, objective={"likelihood": weight})
        recipe = Recipe(config, "none", 40)
        found = recipe.prepare(rewarded)
        output = recipe.loss(
            replace(
                batch,
                advantages_B=found.advantages_B,
                token_weights_B=found.token_weights_B,
                likelihood_weights_B=found.likelihood_weights_B,
            )
        )
        return torch.autograd.grad(output.loss, batch.logprobs_N)[0], output.metrics

    plain_N, without = gradient(0.0)
    with_N, metrics = gradient(0.3)
    right_N = PackedAxis(batch.lengths_B).spread(rewards_B > 0) & batch.loss_mask_N
    expected_N = plain_N - 0.3 * right_N.double() / right_N.sum()
    torch.testing.assert_close(with_N, expected_N, rtol=0, atol=1e-12)
    mean = batch.logprobs_N.detach()[right_N].mean()
    assert metrics["loss/likelihood"][0] == pytest.approx(float(-0.3 * mean))
    assert "loss/likelihood" not in without


def test_a_right_answer_without_an_advantage_is_trained_for_its_likelihood() -> None:
    rewards_B, groups = torch.ones(2, dtype=torch.float64), torch.tensor([0, 0])
    rewarded = Rewarded(rewards_B, groups, torch.tensor([3, 5]))
    assert not Recipe(algorithm(), "none", 40).prepare(rewarded).trained_B.any()
    recipe = Recipe(algorithm(objective={"likelihood": 0.1}), "none", 40)
    assert recipe.prepare(rewarded).trained_B.all()
    half = recipe.weigh(recipe.estimate(rewarded), torch.tensor([True, False]))
    assert half.likelihood_weights_B is not None
    torch.testing.assert_close(half.likelihood_weights_B, torch.tensor([0.1 / 3, 0.0]).double())
