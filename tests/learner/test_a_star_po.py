"""A*-PO by axes that were there: the published square has this gradient."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from maths_oracles import random_batch
from omegaconf import OmegaConf

from common.config.algorithm import AlgorithmConfig
from learner.algorithm.recipe import Recipe
from learner.algorithm.rewarded import Rewarded

RECIPE = Path(__file__).resolve().parents[2] / "deploy/configs/recipes/a_star_po.yaml"
LONGEST, BETA = 16, 1e-3


@pytest.mark.parametrize("seed", range(3))
def test_the_gradient_is_that_of_the_square_by_autograd(seed: int) -> None:
    """mean_i (beta sum log(pi / pi_ref) + V_i - R_i)^2 over 2 beta and the longest answer."""
    own = OmegaConf.merge(
        OmegaConf.structured(AlgorithmConfig), OmegaConf.load(RECIPE)["algorithm"]
    )
    config = OmegaConf.to_object(own)
    assert isinstance(config, AlgorithmConfig)
    assert config.objective.kl == BETA and config.objective.kl_in == "reward"
    batch = random_batch(seed, [5, 1, 9, 4], on_policy=True)
    mask_N = torch.ones_like(batch.loss_mask_N)
    rewards_B, values_B = torch.tensor([[1.0, 0, 0, 1], [0.3, 0.9, 0.1, 0.5]], dtype=torch.float64)
    reference_N = batch.reference_logprobs_N
    assert reference_N is not None
    parts = (batch.logprobs_N - reference_N).split(batch.lengths_B.tolist())
    moved_B = torch.stack([part.sum() for part in parts])
    square = ((BETA * moved_B + values_B - rewards_B) ** 2).mean() / (2 * BETA * LONGEST)
    (theirs,) = torch.autograd.grad(square, batch.logprobs_N)

    recipe = Recipe(config, "none", LONGEST)
    earned_B = rewards_B - values_B - BETA * moved_B.detach()  # what `with_kl_in_rewards` makes
    prepared = recipe.prepare(Rewarded(earned_B, torch.arange(4), batch.lengths_B, "oracle"))
    ours = recipe.loss(
        replace(
            batch,
            loss_mask_N=mask_N,
            behaviour_logprobs_N=batch.old_logprobs_N,
            reference_logprobs_N=None,
            advantages_B=prepared.advantages_B,
            token_weights_B=prepared.token_weights_B,
        )
    ).loss
    torch.testing.assert_close(
        torch.autograd.grad(ours, batch.logprobs_N)[0], theirs, rtol=1e-12, atol=1e-12
    )
