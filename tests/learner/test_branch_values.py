"""Advantages from measured values: exact toys and identities."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from common.config.algorithm import AdvantageConfig
from learner.algorithm.advantage_inputs import AdvantageInputs
from learner.algorithm.branches import branch_values, value_steps
from learner.algorithm.rewarded import Branches, StepTokens
from learner.algorithm.traces import PackedAxis


def inputs(
    lengths: list[int],
    rewards: list[float],
    branches: list[tuple[int, int, float]],
    logprobs: list[float] | None = None,
) -> AdvantageInputs:
    count, total = len(lengths), sum(lengths)
    rewards_B = torch.tensor(rewards, dtype=torch.float64)
    kept_B = ~rewards_B.isnan()
    known = None
    if branches:
        completion, at, values = zip(*branches, strict=True)
        known = Branches(
            torch.tensor(completion), torch.tensor(at), torch.tensor(values, dtype=torch.float64)
        )
    return AdvantageInputs(
        advantages_B=torch.where(kept_B, rewards_B, 0.0),
        rewards_B=rewards_B,
        group_B=torch.zeros(count, dtype=torch.long),
        kept_B=kept_B,
        tokens=StepTokens(
            PackedAxis(torch.tensor(lengths)),
            torch.arange(total),
            torch.ones(total, dtype=torch.bool),
            torch.tensor(logprobs or [-1.0] * total),
            branches=known,
        ),
        baseline=lambda values, groups, lengths: values,
    )


def found(given: AdvantageInputs, zero_above: float = 1.0) -> list[float]:
    config = AdvantageConfig(kind="branch_values")
    values: list[float] = branch_values(given, config, zero_above=zero_above).advantages_N.tolist()
    return values


def test_without_branches_a_token_has_the_advantage_of_its_completion() -> None:
    assert found(inputs([2, 1], [1.0, 0.0], [])) == [1.0, 1.0, 0.0]


def test_the_advantages_of_segments_add_up_to_the_reward_less_the_value_of_the_start() -> None:
    draw = torch.Generator().manual_seed(0)
    for _ in range(50):
        length = int(torch.randint(1, 12, (), generator=draw))
        inner = torch.randperm(length, generator=draw)[: length // 2].sort().values.tolist()
        at = [0, *(t for t in inner if t)]
        values = torch.rand(len(at), generator=draw, dtype=torch.float64).tolist()
        steps = value_steps(at, values, start=9.0, reward=0.25, length=length)
        edges = [*at, length]
        per_segment = [steps[a].item() for a, _ in itertools.pairwise(edges)]
        assert sum(per_segment) == pytest.approx(0.25 - values[0], abs=1e-12)
        for a, b in itertools.pairwise(edges):
            assert (steps[a:b] == steps[a]).all()


def test_measured_values_of_a_tree_give_its_true_advantages() -> None:
    """A coin at each of three tokens; the reward is 1 for at least two heads, known exactly."""

    def value(prefix: tuple[int, ...]) -> float:
        left = 3 - len(prefix)
        ends = itertools.product((0, 1), repeat=left)
        return sum(sum(prefix + end) >= 2 for end in ends) / 2**left

    for tokens in itertools.product((0, 1), repeat=3):
        branches = [(0, t, value(tokens[:t])) for t in range(3)]
        given = inputs([3], [value(tokens)], branches)
        truth = [value(tokens[: t + 1]) - value(tokens[:t]) for t in range(3)]
        assert found(given) == pytest.approx(truth, abs=1e-12)


def test_where_the_start_was_not_measured_the_mean_of_the_group_stands_for_it() -> None:
    given = inputs([3, 1], [1.0, 0.0], [(0, 2, 0.75)])
    assert found(given) == pytest.approx([0.25, 0.25, 0.25, 0.0])


def test_a_completion_without_a_reward_keeps_what_it_had() -> None:
    given = inputs([2, 1], [math.nan, 1.0], [(0, 0, 0.5), (0, 1, 0.5)])
    assert found(given) == [0.0, 0.0, 1.0]


def test_sure_tokens_get_nothing_where_that_is_asked() -> None:
    sure, unsure = math.log(0.95), math.log(0.5)
    given = inputs([3], [1.0], [(0, 0, 0.25)], [sure, unsure, sure])
    assert found(given, zero_above=0.9) == [0.0, 0.75, 0.0]
    assert found(given) == [0.75] * 3
