"""Credit of a group's own tokens: identities, a published table, and labels without a meaning."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch
from maths_oracles import algorithm

from learner.algorithm.group_tokens import fisher, key_values, prefix_steps
from learner.algorithm.prepared import Prepared
from learner.algorithm.recipe import Recipe
from learner.algorithm.recipe_checks import check_recipe
from learner.algorithm.rewarded import Rewarded, StepTokens
from learner.algorithm.traces import PackedAxis

IDS = [[1, 2, 3, 9], [1, 2, 4], [1, 5], [7, 7, 7], [1, 2, 3, 9], [8]]
REWARDS = [1.0, 0.0, 1.0, 0.5, 0.0, 1.0]


def prepared(
    ids: list[list[int]], rewards: list[float], groups: list[int], **sections: object
) -> Prepared:
    flat = torch.tensor([token for own in ids for token in own])
    lengths_B = torch.tensor([len(own) for own in ids])
    tokens = StepTokens(
        PackedAxis(lengths_B),
        flat,
        torch.ones(len(flat), dtype=torch.bool),
        torch.full((len(flat),), -1.0),
    )
    rewards_B = torch.tensor(rewards, dtype=torch.float64)
    given = Rewarded(rewards_B, torch.tensor(groups), lengths_B, tokens=tokens)
    return Recipe(algorithm(**sections), "none", 40).prepare(given)


def test_differences_of_values_are_those_of_means_over_sharing_completions() -> None:
    """Against the definition, prefix by prefix."""
    expected = []
    for own in IDS:
        values = []
        for t in range(len(own) + 1):
            shared = [r for other, r in zip(IDS, REWARDS, strict=True) if other[:t] == own[:t]]
            values.append(sum(shared) / len(shared))
        expected += [b - a for a, b in itertools.pairwise(values)]
    assert prefix_steps(IDS, REWARDS) == pytest.approx(expected, abs=1e-15)


def test_completions_that_part_at_once_have_grpos_advantage_behind_their_first_token() -> None:
    ids = [[1, 2, 2], [2, 2, 2], [3, 2, 2], [4, 2, 2]]
    found = prepared(ids, [1.0, 0.0, 0.0, 1.0], [0] * 4, advantage={"kind": "prefix_values"})
    assert found.advantages_N is not None
    a_BT = found.advantages_N.view(4, 3)
    assert torch.equal(a_BT[:, 1:], found.advantages_B[:, None].expand(4, 2))
    # There V goes from the mean to R, so the difference over the deviation is A once more.
    assert torch.allclose(a_BT[:, 0], 2 * found.advantages_B, atol=1e-12)


def test_a_token_that_all_share_changes_no_value() -> None:
    ids = [[5, 1], [5, 2], [5, 3]]
    found = prepared(ids, [1.0, 0.0, 0.0], [0] * 3, advantage={"kind": "prefix_values"})
    assert found.advantages_N is not None
    assert torch.allclose(found.advantages_N[::2], found.advantages_B, atol=1e-12)


@pytest.mark.parametrize("kind", ["prefix_values", "key_tokens"])
def test_without_weight_and_in_uniform_groups_tokens_are_alike(kind: str) -> None:
    ids, groups = IDS + IDS, [0] * 6 + [1] * 6
    rewards = REWARDS + [1.0] * 6
    plain = prepared(ids, rewards, groups)
    lengths = torch.tensor([len(own) for own in ids])
    advantage = {"kind": kind, "args": {"weight": 0.0}}
    nothing = prepared(ids, rewards, groups, advantage=advantage)
    assert nothing.advantages_N is not None
    assert torch.equal(nothing.advantages_N, plain.advantages_B.repeat_interleave(lengths))
    some = prepared(ids, rewards, groups, advantage={"kind": kind})
    assert some.advantages_N is not None
    second = int(lengths[:6].sum())
    assert some.advantages_N[second:].abs().sum() == 0
    assert not torch.equal(some.advantages_N, nothing.advantages_N)
    check_recipe(algorithm(advantage={"kind": kind}, rollout={"dynamic_sampling": True}), "none")


def test_a_completion_that_does_not_count_is_in_no_value() -> None:
    counted = prepared(IDS[:5], REWARDS[:5], [0] * 5, advantage={"kind": "prefix_values"})
    rewards = [*REWARDS[:5], math.nan]
    with_one = prepared([*IDS[:5], IDS[0]], rewards, [0] * 6, advantage={"kind": "prefix_values"})
    assert counted.advantages_N is not None
    assert with_one.advantages_N is not None
    size = len(counted.advantages_N)
    assert torch.allclose(with_one.advantages_N[:size], counted.advantages_N, atol=1e-12)
    assert with_one.advantages_N[size:].abs().sum() == 0


def test_fishers_exact_test_of_known_tables() -> None:
    assert fisher(3, 1, 2, 4) == pytest.approx(0.5238, abs=5e-5)
    assert fisher(3, 1, 1, 3) == pytest.approx(0.4857, abs=5e-5)  # the lady tasting tea
    assert fisher(4, 4, 0, 0) == 1.0


def test_labels_the_other_way_round_turn_the_sign_alone() -> None:
    right = [True, False, True, False, False, True]
    keys = key_values(IDS, right)
    assert keys == pytest.approx([-k for k in key_values(IDS, [not r for r in right])], abs=1e-15)
    assert max(map(abs, keys)) > 0


def test_a_token_of_all_completions_and_the_last_of_each_have_no_key() -> None:
    ids = [[5, 1, 5], [5, 2, 0], [5, 1, 0], [5, 3, 0]]
    keys = key_values(ids, [True, False, True, False])
    assert keys[0] == keys[3] == 0.0
    assert [keys[i] for i in (2, 5, 8, 11)] == [0.0] * 4
    assert keys[1] == keys[7] > 0 > keys[4]


def test_labels_without_relation_to_the_text_give_small_keys() -> None:
    """Zipf's tokens, 8 completions of 300: with the paper's frequencies 28 % exceed a half."""
    draw = random.Random(0)
    weights = [1 / (rank + 1) for rank in range(5000)]
    large = total = 0
    for _ in range(5):
        ids = [draw.choices(range(5000), weights, k=300) for _ in range(8)]
        keys = key_values(ids, [i % 2 == 0 for i in range(8)])
        large += sum(abs(key) > 0.5 for key in keys)
        total += len(keys)
    assert large / total < 0.01
