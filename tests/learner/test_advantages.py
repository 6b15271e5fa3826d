"""Baselines: hand-computed tables, invariances, and the hard cases."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from maths_oracles import normal, random, seeds

from common.config.algorithm import ALONE, BaselineConfig
from common.errors import VerifierError
from learner.algorithm.advantages import (
    BASELINES,
    check_rewards,
    group_advantages,
    kl_penalised_rewards,
)
from learner.algorithm.grouped import RewardPart

NAN = float("nan")


def advantages(rewards: list[float], kind: str = "grpo", group=None, **options):
    group_B = torch.tensor(group or [0] * len(rewards), dtype=torch.long)
    config = BaselineConfig(kind=kind, **options)
    found_B, kept_B = estimate(torch.tensor(rewards, dtype=torch.float64), group_B, config)
    return found_B.tolist(), kept_B.tolist()


def estimate(
    rewards_B: torch.Tensor,
    group_B: torch.Tensor,
    config: BaselineConfig,
    lengths_B: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    if lengths_B is None:
        lengths_B = torch.arange(1, len(rewards_B) + 1)
    return group_advantages(rewards_B, group_B, lengths_B, config, BASELINES.rule(config))[:2]


def test_table_by_hand() -> None:
    rewards = [1.0, 0.0, 0.0, 3.0]  # mean 1, sample variance 2, mean of the others 1, 4/3, 4/3, 1/3
    root = 2**0.5
    assert advantages(rewards, epsilon=0.0)[0] == pytest.approx([0, -1 / root, -1 / root, 2 / root])
    assert advantages(rewards, "dr_grpo")[0] == [0, -1, -1, 2]
    assert advantages(rewards, "rloo")[0] == pytest.approx([0, -4 / 3, -4 / 3, 8 / 3])
    assert advantages(rewards, "none")[0] == rewards
    assert advantages(rewards, "raft") == (rewards, [True, False, False, True])
    assert advantages(rewards, "reinforce_rej") == (rewards, [True] * 4)


def test_grpo_uses_the_sample_standard_deviation() -> None:
    rewards = normal(8, random(0))
    expected = (rewards - rewards.mean()) / (torch.std(rewards) + 1e-6)
    assert advantages(rewards.tolist())[0] == pytest.approx(expected.tolist())


def test_kalman_by_hand() -> None:
    """Two steps of the filter, x0 = 0, P0 = 1, Q = 1e-5, R = 1e-2."""
    p = 1.00001
    k = p / (p + 0.01)
    x, p = k * 1.0, (1 - k) * p
    first = (1 - x) / (p**0.5 + 1e-8)
    p += 1e-5
    k = p / (p + 0.01)
    x, p = x + k * (0 - x), (1 - k) * p
    second = (0 - x) / (p**0.5 + 1e-8)
    assert advantages([1.0, 0.0], "krpo")[0] == pytest.approx([first, second])
    interleaved, _ = advantages([1.0, 5.0, 0.0, 5.0], "krpo", [0, 1, 0, 1])
    assert [interleaved[0], interleaved[2]] == pytest.approx([first, second])


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "rloo"])
@pytest.mark.parametrize("reward", [0.1, 0.0, 1.0, -3.3, 1e9])
def test_uniform_groups_have_exactly_no_signal(kind: str, reward: float) -> None:
    """0.1 three times has a mean that is not 0.1 in floating point."""
    for size in (1, 2, 3, 7, 100):
        assert advantages([reward] * size, kind)[0] == [0.0] * size


def test_reinforce_rej_drops_uniform_prompts() -> None:
    found, kept = advantages([1, 1, 0, 1, 0, 0], "reinforce_rej", [0, 0, 1, 1, 2, 2])
    assert (found, kept) == ([0, 0, 0, 1, 0, 0], [False, False, True, True, False, False])


def test_min_advantage_clamps_from_below() -> None:
    found, _ = advantages([1.0, 0.0, 0.0, 3.0], "dr_grpo", min_advantage=-0.1)
    assert found == [0, -0.1, -0.1, 2]


OF_THE_BATCH = {"batch_std", "gdpo", "reinforce_pp", "reinforce_pp_baseline"}
"""Baselines that look beyond the group."""


@given(seeds, st.integers(1, 6), st.sampled_from(sorted(set(BASELINES.rules) - OF_THE_BATCH)))
@settings(max_examples=40, deadline=None)
def test_groups_are_independent_and_missing_rewards_do_not_count(
    seed: int, groups: int, kind: str
) -> None:
    """All groups at once = one at a time without the completions that have no reward."""
    generator = random(seed)
    group_B = torch.randint(0, groups, (20,), generator=generator)
    highest = 2 if kind == "disco" else 3
    rewards_B = torch.randint(0, highest, (20,), generator=generator).double()
    rewards_B[torch.rand(20, generator=generator) < 0.2] = NAN
    lengths_B = torch.randint(1, 9, (20,), generator=generator)
    config = BaselineConfig(kind=kind, min_advantage=-0.5)
    found_B, kept_B = estimate(rewards_B, group_B, config, lengths_B)
    assert found_B.isfinite().all()
    assert not kept_B[rewards_B.isnan()].any()
    assert (found_B[~kept_B] == 0).all()
    for group in range(groups):
        members = (group_B == group) & ~rewards_B.isnan()
        alone_B, _ = estimate(rewards_B[members], group_B[members] * 0, config, lengths_B[members])
        torch.testing.assert_close(found_B[members], alone_B)


@given(seeds, st.floats(0.1, 10), st.floats(-5, 5))
@settings(max_examples=20, deadline=None)
def test_grpo_ignores_shift_and_scale(seed: int, scale: float, shift: float) -> None:
    rewards = normal(6, random(seed))
    one, _ = advantages(rewards.tolist(), epsilon=0.0)
    other, _ = advantages((rewards * scale + shift).tolist(), epsilon=0.0)
    assert other == pytest.approx(one)
    assert sum(one) == pytest.approx(0, abs=1e-9)


def test_maxrl_by_hand_and_by_enumeration() -> None:
    """(R - p) / p; over all 16 outcomes of four answers at p = 0.3, the gradient of pass@k / k."""
    assert advantages([1, 0, 0, 0], "maxrl", epsilon=1e-9)[0] == pytest.approx([3, -1, -1, -1])
    assert advantages([0, 0, 0, 0], "maxrl")[0] == [0] * 4
    one, scaled = (advantages([c, 0, c, 0], "maxrl", epsilon=1e-12)[0] for c in (1.0, 5.0))
    assert scaled == pytest.approx(one)
    p, found = 0.3, 0.0
    for outcome in itertools.product([0.0, 1.0], repeat=4):
        weight = math.prod(p if r else 1 - p for r in outcome)
        score = [(1 / p if r else -1 / (1 - p)) for r in outcome]  # d log probability / d p
        given_A = advantages(list(outcome), "maxrl", epsilon=1e-12)[0]
        found += weight * sum(a * s for a, s in zip(given_A, score, strict=True)) / 4
    # d pass@k / d p = k (1 - p)^(k - 1)
    assert found == pytest.approx(sum((1 - p) ** (k - 1) for k in range(1, 4)))


def test_disco_is_the_mean_right_score_less_the_mean_wrong_one() -> None:
    found, _ = advantages([1, 1, 1, 0], "disco")
    scores = [0.3, -1.2, 2.0, 0.7]
    weighed = sum(a * s for a, s in zip(found, scores, strict=True)) / 4
    assert weighed == pytest.approx(sum(scores[:3]) / 3 - scores[3])
    assert advantages([1, 1], "disco")[0] == [0, 0]


@pytest.mark.parametrize(
    ("kind", "reward", "wanted"), [("maxrl", -0.5, "at least 0"), ("disco", 0.5, "of 0 and 1")]
)
def test_a_reward_without_a_meaning_is_refused(kind: str, reward: float, wanted: str) -> None:
    with pytest.raises(VerifierError, match=rf"kind={kind} takes rewards .*{wanted}"):
        advantages([1.0, reward], kind)


def test_a_quantile_reinforces_hard_prompts_and_punishes_on_easy_ones() -> None:
    hard, _ = advantages([1, 0, 0, 0], "quantile")
    assert hard[0] > 0
    assert hard[1:] == [0, 0, 0]
    easy, _ = advantages([1, 1, 1, 0], "quantile")
    assert easy[:3] == [0, 0, 0]
    assert easy[3] < 0
    # Five right of eight and K = 0.4: the fourth smallest, which is right; rounding down gives 0.
    assert advantages([1] * 5 + [0] * 3, "quantile")[0][0] == 0
    graded, _ = advantages([0.1, 0.4, 0.9], "quantile", epsilon=0.0, args={"quantile": 0.5})
    assert graded[1] == 0


def test_opo_weighs_the_mean_by_length() -> None:
    """Lengths 1 and 2: the mean of (1, 0) is 1/3."""
    assert advantages([1, 0], "opo")[0] == pytest.approx([2 / 3, -1 / 3])
    assert advantages([1, 1], "opo")[0] == [0, 0]


def test_pass_at_k_rewards_the_best_alone() -> None:
    assert advantages([0.2, 1.0, 0.7], "pass_at_k")[0] == pytest.approx([0, 0.3, 0])
    assert advantages([1, 1, 0], "pass_at_k")[0] == [0, 0, 0]
    assert advantages([1], "pass_at_k")[0] == [0]


def test_baselines_over_the_batch() -> None:
    """Rewards (1, 0), (1, 1): deviation 1/2 over all four, mean 3/4."""
    groups = [0, 0, 1, 1]
    assert advantages([1, 0, 1, 1], "batch_std", groups, epsilon=1e-12)[0] == pytest.approx(
        [1, -1, 0, 0]
    )
    assert advantages([1, 0, 1, 1], "reinforce_pp", groups, epsilon=1e-12)[0] == pytest.approx(
        [0.5, -1.5, 0.5, 0.5]
    )
    both, _ = advantages([1, 0, 1, 1], "reinforce_pp_baseline", groups, epsilon=1e-12)
    root = (1 / 6) ** 0.5  # of (1/2, -1/2, 0, 0)
    assert both == pytest.approx([0.5 / root, -0.5 / root, 0, 0])


def test_no_completion_at_all() -> None:
    for kind in BASELINES.rules:
        assert advantages([], kind) == ([], [])
        assert advantages([NAN, NAN], kind) == ([0, 0], [False, False])


@pytest.mark.parametrize("bad", [NAN, float("inf"), -float("inf")])
def test_check_rewards_names_the_verifier(bad: float) -> None:
    check_rewards(torch.tensor([0.0, 1.0]), "unit_tests")
    with pytest.raises(VerifierError, match=rf"'unit_tests' returned {bad} .*completion 2"):
        check_rewards(torch.tensor([0.0, 1.0, bad, bad]), "unit_tests")


def test_kl_penalty() -> None:
    rewards_B = torch.tensor([1.0, 0.0])
    assert kl_penalised_rewards(rewards_B, torch.tensor([2.0, -4.0]), 0.25).tolist() == [0.5, 1.0]


@pytest.mark.parametrize("kind", sorted(BASELINES.rules))
def test_which_baselines_need_a_group_is_what_the_configuration_says(kind: str) -> None:
    """Groups of one, whose rewards differ: an advantage only under those that need no other."""
    found, kept = advantages([0.0, 1.0, 1.0], kind, [0, 1, 2])
    learns = any(each != 0 for each, counts in zip(found, kept, strict=True) if counts)
    assert learns == (kind in ALONE)


def gdpo(parts: list[tuple[list[float], float]], group: list[int]) -> list[float]:
    given = [RewardPart(torch.tensor(v, dtype=torch.float64), weight) for v, weight in parts]
    total_B = sum(part.weight * part.values for part in given)
    group_B, config = torch.tensor(group), BaselineConfig("gdpo")
    rule = BASELINES.rule(config)
    return group_advantages(total_B, group_B, group_B + 1, config, rule, given)[0].tolist()


def test_a_verifier_of_large_rewards_does_not_drown_another() -> None:
    """Rewards (1, 0), (1, 0), (0, 5), (0, 0): the sum says -.34, -.34, 1.47, -.79."""
    parts = [([1.0, 1.0, 0.0, 0.0], 1.0), ([0.0, 0.0, 5.0, 0.0], 1.0)]
    found = gdpo(parts, [0, 0, 0, 0])
    summed = torch.tensor([3**0.5 / 2 - 0.5] * 2 + [1.5 - 3**0.5 / 2, -0.5 - 3**0.5 / 2])
    assert found == pytest.approx((summed / summed.std()).tolist(), rel=1e-5)
    scaled = [parts[0], ([0.0, 0.0, 0.01, 0.0], 1.0)]
    assert gdpo(scaled, [0, 0, 0, 0]) == pytest.approx(found, abs=1e-3)


def test_a_verifier_that_says_the_same_of_all_counts_for_nothing() -> None:
    rewards = [1.0, 0.0, 0.3, 0.1, 0.1, 0.1]
    group = [0, 0, 0, 1, 1, 1]
    alone = gdpo([(rewards, 1.0)], group)
    assert gdpo([(rewards, 1.0), ([0.1] * 6, 3.0)], group) == alone
    assert alone[3:] == [0, 0, 0]  # to the bit: nothing to train on


def test_with_one_verifier_it_is_grpo_over_the_deviation_of_the_batch() -> None:
    rewards, group = [1.0, 0.0, 0.3, 0.5, 0.1, 0.2], [0, 0, 0, 1, 1, 1]
    plain = torch.tensor(advantages(rewards, "grpo", group)[0], dtype=torch.float64)
    assert gdpo([(rewards, 2.0)], group) == pytest.approx((plain / plain.std()).tolist(), rel=1e-4)
    assert advantages(rewards, "gdpo", group)[0] == pytest.approx(gdpo([(rewards, 1.0)], group))


def test_disco_is_the_gradient_of_its_own_objective() -> None:
    """Mean of right s less tau log mean of wrong e^(s / tau), under a sequence mean; autograd."""
    scores_B = normal(7, random(0), 2.0).requires_grad_()
    rewards_B = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0, 1.0, 1.0], dtype=torch.float64)
    group_B = torch.tensor([0, 0, 0, 0, 0, 1, 1])
    args = {"negatives": "softmax", "temperature": 0.7}
    config = BaselineConfig("disco", args=args)
    found_B, _, _ = group_advantages(
        rewards_B, group_B, group_B + 1, config, BASELINES.rule(config), (), scores_B.detach()
    )
    right_B, wrong_B = scores_B[[0, 3]], scores_B[[1, 2, 4]]
    objective = right_B.mean() - 0.7 * (wrong_B / 0.7).exp().mean().log()
    (grad_B,) = torch.autograd.grad(objective, scores_B)
    torch.testing.assert_close(found_B[:5] / 5, grad_B[:5])
    assert found_B[5:].tolist() == [0, 0]
    sharp = BaselineConfig("disco", args={"negatives": "softmax", "temperature": 1e-4})
    sharp_B = group_advantages(
        rewards_B, group_B, group_B + 1, sharp, BASELINES.rule(sharp), (), scores_B.detach()
    )[0]
    surest = int(wrong_B.argmax())
    assert sharp_B[[1, 2, 4]].tolist() == [-5.0 * (i == surest) for i in range(3)]
    plain = BaselineConfig("disco", args={"negatives": "softmax", "temperature": 1e9})
    limit_B, _, _ = group_advantages(
        rewards_B, group_B, group_B + 1, plain, BASELINES.rule(plain), (), scores_B.detach()
    )
    without = advantages(rewards_B.tolist(), "disco", group_B.tolist())[0]
    assert limit_B.tolist() == pytest.approx(without, rel=1e-6)
