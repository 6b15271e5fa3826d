"""What the recipes' files and their page say, held by identities on the recipes themselves."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from maths_oracles import algorithm, normal, random, random_batch
from torch import Tensor

from common.config.algorithm import AlgorithmConfig, BaselineConfig
from common.config.load import load_config
from learner.algorithm.advantages import BASELINES, group_advantages
from learner.algorithm.corrections import behaviour_gap
from learner.algorithm.loss import CompletionBatch, policy_loss
from learner.algorithm.prepared import Prepared
from learner.algorithm.recipe import Recipe
from learner.algorithm.rewarded import Rewarded
from learner.algorithm.traces import PackedAxis

RECIPES = Path(__file__).resolve().parents[2] / "deploy" / "configs" / "recipes"
NAMES = sorted(path.stem for path in RECIPES.glob("*.yaml"))
LIMIT = 20


def config_of(name: str, *keys: str) -> AlgorithmConfig:
    return load_config([], ["model.path=none", f"recipe={name}", *keys], RECIPES).algorithm


def prepared(
    config: AlgorithmConfig, rewards: list[float], group: list[int], cut: list[bool] | None = None
) -> Prepared:
    """Completions of 1, 2, 3, ... tokens; `cut` are those at the limit."""
    lengths = torch.arange(1, len(rewards) + 1)
    given = torch.tensor(rewards, dtype=torch.float64)
    cut_B = None if cut is None else torch.tensor(cut)
    return Recipe(config, "none", LIMIT).prepare(
        Rewarded(given, torch.tensor(group), lengths, "v", lengths, cut_B)
    )


def gradient(batch: CompletionBatch, config: AlgorithmConfig, correction: str) -> Tensor:
    loss = policy_loss(batch, config, correction).loss
    return torch.autograd.grad(loss, batch.logprobs_N, retain_graph=True)[0]


def test_the_page_names_every_recipe_with_a_kl() -> None:
    text = (RECIPES / "README.md").read_text()
    named = re.search(r"\*\*KL\.\*\* Every recipe but (.+?) has none\.", text, re.DOTALL)
    assert named is not None
    found = {name for name in NAMES if config_of(name).objective.kl > 0}
    assert set(re.findall(r"`(\w+)`", named.group(1))) == found


@pytest.mark.parametrize("name", NAMES)
def test_no_recipe_leaves_truncated_answers_out_of_the_loss(name: str) -> None:
    """Not DAPO either: its authors ran most of the paper without that mask."""
    assert not config_of(name).rollout.mask_truncated


def test_dapo_trains_on_answers_that_were_cut() -> None:
    found = prepared(config_of("dapo"), [1, 0, 1, 0], [0] * 4, [True, False, False, True])
    assert found.kept_B.all() and found.trained_B.all()


@pytest.mark.parametrize("kind", ["sequence_mean", "token_mean", "constant"])
def test_a_masked_answer_is_in_no_denominator(kind: str) -> None:
    """The token weights of the others are those of a batch without it."""
    masked = algorithm(rollout={"mask_truncated": True}, aggregation={"kind": kind})
    found = prepared(masked, [1, 0, 1, 0], [0] * 4, [False, False, False, True])
    without = prepared(masked, [1, 0, 1], [0] * 3)
    assert found.token_weights_B.tolist() == [*without.token_weights_B.tolist(), 0]


@pytest.mark.parametrize("seed", range(3))
def test_lambda_grpo_begins_as_grpo_with_a_token_mean(seed: int) -> None:
    """The paper's "DAPO": without the higher clip, which the ratios here would show."""
    rewards, group = [1.0, 0.0, 0.0, 1.0, 1.0, 0.0], [0, 0, 0, 1, 1, 1]
    batch = random_batch(seed, [1, 2, 3, 4, 5, 6])
    found = []
    plain = config_of("grpo", "algorithm.aggregation.kind=token_mean")
    for config in (config_of("lambda_grpo"), plain):
        of = prepared(config, rewards, group)
        batch.advantages_B, batch.token_weights_B = of.advantages_B, of.token_weights_B
        found.append(gradient(batch, config, "none"))
    assert torch.equal(*found)
    higher = config_of("lambda_grpo", "algorithm.objective.clip_high=0.28")
    assert not torch.equal(gradient(batch, higher, "none"), found[0])


REWARDS, GROUP = [1.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0, 0.0], [0, 0, 1, 1, 2, 2, 3, 3]


def test_raft_has_no_place_in_a_denominator_for_what_it_drops() -> None:
    found = prepared(config_of("raft"), REWARDS, GROUP)
    right = [reward == 1 for reward in REWARDS]
    assert found.kept_B.tolist() == right
    expected = [1 / (4 * (i + 1)) * counts for i, counts in enumerate(right)]
    assert found.token_weights_B.tolist() == pytest.approx(expected)


def test_reinforce_rej_pushes_nothing_down_where_rewards_are_0_and_1() -> None:
    """It goes as RAFT does without the prompts that are all right; rewards of +1 and -1 push."""
    rejecting = prepared(config_of("reinforce_rej"), REWARDS, GROUP)
    assert rejecting.kept_B.tolist() == [True, True, False, False, False, False, True, True]
    assert (rejecting.advantages_B >= 0).all()
    mixed = [reward if g in (0, 3) else 0.0 for reward, g in zip(REWARDS, GROUP, strict=True)]
    raft = prepared(config_of("raft"), mixed, GROUP)
    pulls = [of.advantages_B * of.token_weights_B for of in (rejecting, raft)]
    assert torch.allclose(pulls[0] * 2, pulls[1])  # of four that count, and of two
    signed = prepared(config_of("reinforce_rej"), [2 * r - 1 for r in REWARDS], GROUP)
    assert signed.advantages_B.tolist() == [1, -1, 0, 0, 0, 0, 1, -1]


@pytest.mark.parametrize("kind", ["gspo", "gmpo"])
def test_weights_of_tokens_act_as_their_mean_under_one_ratio_a_completion(kind: str) -> None:
    """TRL's convention. verl gives each token its own weight, which is another gradient."""
    config = algorithm(objective={"kind": kind, "clip_low": 0.3, "clip_high": 0.3})
    config.correction.cap = 1.3
    batch = random_batch(0, [3, 9, 1, 6])
    batch.loss_mask_N[:] = True
    axis = PackedAxis(batch.lengths_B)
    gap_N = behaviour_gap(batch.old_logprobs_N, batch.behaviour_logprobs_N)
    weight_N = gap_N.exp().clamp(max=1.3)
    found, plain = (gradient(batch, config, correction) for correction in ("tis", "none"))
    torch.testing.assert_close(found, plain * axis.spread(axis.mean(weight_N)))
    assert not torch.allclose(found, plain * weight_N)


def advantages(kind: str, rewards: list[float]) -> list[float]:
    config = BaselineConfig(kind)
    given, group = torch.tensor(rewards, dtype=torch.float64), torch.zeros(len(rewards)).long()
    return group_advantages(given, group, group + 1, config, BASELINES.rule(config))[0].tolist()


def test_krpos_advantages_are_as_large_and_as_uneven_as_its_page_says() -> None:
    late = advantages("krpo", [0, 0, 0, 0, 1, 1, 1, 1])
    assert late == pytest.approx([0, 0, 0, 0, 17.8, 16.2, 15.0, 13.9], abs=0.05)
    right = advantages("krpo", [1] * 8)
    assert (right[0], right[-1]) == pytest.approx((0.1, 0.03), abs=0.006)
    assert right == sorted(right, reverse=True)


def credits_of(lengths: list[int], *keys: str) -> list[float]:
    """What each completion gets of all credit, |sum of gradients|, at the old policy and A = 1."""
    config = config_of("grpo_lambda_recent", *keys)
    batch: Any = random_batch(0, lengths, on_policy=True)
    batch.loss_mask_N[:] = True
    batch.behaviour_logprobs_N = batch.old_logprobs_N
    batch.advantages_B = torch.ones(len(lengths), dtype=torch.float64)
    of = Recipe(config, "none", max(lengths)).prepare(
        Rewarded(normal(len(lengths), random(0)), torch.zeros(len(lengths)).long(), batch.lengths_B)
    )
    batch.token_weights_B = of.token_weights_B
    axis = PackedAxis(batch.lengths_B)
    return (-axis.sum(gradient(batch, config, "none"))).tolist()


def test_the_credit_of_a_completion_grows_with_its_length_as_the_page_says() -> None:
    lengths = [10, 48, 100, 768]
    raw = [credit * len(lengths) for credit in credits_of(lengths)]
    assert raw == pytest.approx([5.3, 21, 37, 87], rel=0.02)
    even = credits_of(lengths, "algorithm.credit.normalize=mean")
    assert even == pytest.approx([1 / len(lengths)] * len(lengths))
