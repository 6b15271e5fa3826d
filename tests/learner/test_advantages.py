"""Baselines: hand-computed tables, invariances, and the hard cases."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from maths_oracles import normal, random, seeds

from common.config.algorithm import BaselineConfig
from common.errors import VerifierError
from learner.algorithm.advantages import (
    BASELINES,
    check_rewards,
    group_advantages,
    kl_penalised_rewards,
)

NAN = float("nan")


def advantages(rewards: list[float], kind: str = "grpo", group=None, **options):
    group_B = torch.tensor(group or [0] * len(rewards), dtype=torch.long)
    config = BaselineConfig(kind=kind, **options)
    found_B, kept_B = estimate(torch.tensor(rewards, dtype=torch.float64), group_B, config)
    return found_B.tolist(), kept_B.tolist()


def estimate(
    rewards_B: torch.Tensor, group_B: torch.Tensor, config: BaselineConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    return group_advantages(rewards_B, group_B, config, BASELINES.rule(config))[:2]


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


@given(seeds, st.integers(1, 6), st.sampled_from(sorted(BASELINES.rules)))
@settings(max_examples=40, deadline=None)
def test_groups_are_independent_and_missing_rewards_do_not_count(
    seed: int, groups: int, kind: str
) -> None:
    """All groups at once = one at a time without the completions that have no reward."""
    generator = random(seed)
    group_B = torch.randint(0, groups, (20,), generator=generator)
    rewards_B = torch.randint(0, 3, (20,), generator=generator).double()
    rewards_B[torch.rand(20, generator=generator) < 0.2] = NAN
    config = BaselineConfig(kind=kind, min_advantage=-0.5)
    found_B, kept_B = estimate(rewards_B, group_B, config)
    assert found_B.isfinite().all()
    assert not kept_B[rewards_B.isnan()].any()
    assert (found_B[~kept_B] == 0).all()
    for group in range(groups):
        members = (group_B == group) & ~rewards_B.isnan()
        alone_B, _ = estimate(rewards_B[members], group_B[members] * 0, config)
        torch.testing.assert_close(found_B[members], alone_B)


@given(seeds, st.floats(0.1, 10), st.floats(-5, 5))
@settings(max_examples=20, deadline=None)
def test_grpo_ignores_shift_and_scale(seed: int, scale: float, shift: float) -> None:
    rewards = normal(6, random(seed))
    one, _ = advantages(rewards.tolist(), epsilon=0.0)
    other, _ = advantages((rewards * scale + shift).tolist(), epsilon=0.0)
    assert other == pytest.approx(one)
    assert sum(one) == pytest.approx(0, abs=1e-9)


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
