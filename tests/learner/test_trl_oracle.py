"""Losses, masks and advantages against TRL's own code, on the same tensors.

TRL is in a dependency group of its own; `make test-oracle` runs these in TRL's environment. What is
compared, and how, stands in `tests/support/trl_oracle.py`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from maths_oracles import normal, random
from trl_oracle import (
    CASES,
    GROUP_SIZE,
    GROUPS,
    OF_RECIPES,
    ROWS,
    SEEDS,
    Data,
    differences,
    our_loss,
    recipe_config,
    trl_advantages,
)

from common.config.algorithm import BaselineConfig
from learner.algorithm.advantages import BASELINES, group_advantages
from learner.algorithm.grouped import RewardPart

TRL_EPSILON = 1e-4
"""What TRL adds to every deviation; ours is `baseline.epsilon`."""


@pytest.fixture(scope="module")
def trl_trainer() -> Any:
    try:
        from trl import GRPOTrainer
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"trl is not importable: {error}")
    return GRPOTrainer


@pytest.mark.parametrize("name", [*OF_RECIPES, *CASES])
@pytest.mark.parametrize("seed", SEEDS)
def test_same_loss_and_gradient(trl_trainer: Any, name: str, seed: int) -> None:
    loss, gradient = differences(trl_trainer, name, seed)
    # TRL keeps SAPO's temperatures in float32.
    tolerance = 1e-7 if name.startswith("sapo") else 1e-14
    assert loss < tolerance
    assert gradient < tolerance


@pytest.mark.parametrize("name", [*OF_RECIPES])
def test_the_tensors_show_what_the_recipe_is_about(name: str) -> None:
    """Every gradient differs from GRPO's: else a comparison would say nothing of the recipe."""
    found = []
    for config in (recipe_config(name), recipe_config("grpo")):
        data = Data(0)
        loss, _ = our_loss(config, data)
        found.append(torch.autograd.grad(loss, data.logprobs_BT)[0])
    same = torch.nn.functional.cosine_similarity(found[0].flatten(), found[1].flatten(), dim=0)
    assert (float(same) < 0.999) == (name != "grpo")


@pytest.mark.parametrize(
    ("kind", "scale", "aggregation"),
    [
        ("grpo", "group", "sum_then_normalize"),
        ("dr_grpo", "none", "sum_then_normalize"),
        ("batch_std", "batch", "sum_then_normalize"),
        ("gdpo", "group", "normalize_then_sum"),
    ],
)
@pytest.mark.parametrize("seed", SEEDS)
def test_same_advantages(
    trl_trainer: Any, kind: str, scale: str, aggregation: str, seed: int
) -> None:
    """Two verifiers; the last group has equal rewards from one of them."""
    generator = random(seed)
    rewards_BR = normal(2 * ROWS, generator, 3.0).view(ROWS, 2)
    rewards_BR[-GROUP_SIZE:, 0] = 1.0
    weights_R = torch.tensor([1.0, 0.3], dtype=torch.float64)
    theirs = trl_advantages(trl_trainer, rewards_BR, weights_R, scale, aggregation)
    config = BaselineConfig(kind, epsilon=TRL_EPSILON)
    group_B = torch.arange(GROUPS).repeat_interleave(GROUP_SIZE)
    ours, _, _ = group_advantages(
        rewards_BR @ weights_R,
        group_B,
        group_B + 1,
        config,
        BASELINES.rule(config),
        [RewardPart(rewards_BR[:, r], float(weights_R[r])) for r in range(2)],
    )
    # TRL keeps a factor of its deviation in float32.
    torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-12)
