"""Losses of GRPO, DAPO, Dr. GRPO, GSPO and CISPO against TRL, on the same tensors.

TRL is in a dependency group of its own; `make test-oracle` runs these in TRL's environment.
Its loss method runs on a stand-in that holds the log-probabilities and the few settings it reads.
"""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from maths_oracles import algorithm, normal, random
from torch import Tensor

from learner.algorithm.loss import CompletionBatch
from learner.algorithm.recipe import Recipe

GROUPS, GROUP_SIZE, WIDTH = 3, 4, 9
MAX_TOKENS = 16
DEFAULT = {"loss_type": "grpo", "level": "token", "beta": 0.0, "low": 0.2, "high": 0.2}

CASES = {
    "grpo": ({"beta": 0.04}, {"objective": {"kl": 0.04}}),
    "grpo no kl": ({}, {}),
    "bnpo": ({"loss_type": "bnpo"}, {"aggregation": {"kind": "token_mean"}}),
    "dapo": (
        {"loss_type": "dapo", "high": 0.28},
        {"aggregation": {"kind": "token_mean"}, "objective": {"clip_high": 0.28}},
    ),
    "dr_grpo": (
        {"loss_type": "dr_grpo"},
        {"baseline": {"kind": "dr_grpo"}, "aggregation": {"kind": "constant"}},
    ),
    "gspo": (
        {"level": "sequence", "low": 0.03, "high": 0.04},
        {"objective": {"kind": "gspo", "clip_low": 0.03, "clip_high": 0.04}},
    ),
    # TRL's epsilon_high is the absolute upper bound of CISPO's ratio, and there is no lower one.
    "cispo": (
        {"loss_type": "cispo", "high": 1.2},
        {
            "objective": {"kind": "cispo", "clip_low": 1.0, "clip_high": 0.2},
            "aggregation": {"kind": "token_mean"},
        },
    ),
}


@pytest.fixture(scope="module")
def trl_trainer() -> Any:
    try:
        from trl import GRPOTrainer
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"trl is not importable: {error}")
    return GRPOTrainer


class Accelerator:
    """One process."""

    num_processes = 1

    def gather(self, values: Tensor) -> Tensor:
        return values

    def reduce(self, values: Tensor, reduction: str) -> Tensor:
        return values


def trl_loss(trainer: Any, settings: dict[str, Any], logprobs_BT: Tensor, inputs: dict) -> Tensor:
    settings = {**DEFAULT, **settings}
    stand_in = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *args, **kwargs: (
            logprobs_BT,
            torch.zeros_like(logprobs_BT),
            None,
        ),
        loss_type=settings["loss_type"],
        importance_sampling_level=settings["level"],
        beta=settings["beta"],
        epsilon_low=settings["low"],
        epsilon_high=settings["high"],
        args=SimpleNamespace(delta=None, use_bias_correction_kl=False),
        model=SimpleNamespace(training=False),
        accelerator=Accelerator(),
        max_completion_length=MAX_TOKENS,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        use_vllm=False,
        aux_loss_enabled=False,
        _entropy_bonus_enabled=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
    )
    loss: Tensor = trainer._compute_loss(stand_in, None, inputs)
    return loss


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("seed", range(3))
def test_same_loss_and_gradient(trl_trainer: Any, name: str, seed: int) -> None:
    settings, axes = CASES[name]
    generator = random(seed)
    rows = GROUPS * GROUP_SIZE
    lengths_B = torch.randint(1, WIDTH + 1, (rows,), generator=generator)
    mask_BT = torch.arange(WIDTH) < lengths_B[:, None]

    def noise(scale: float) -> Tensor:
        return normal(rows * WIDTH, generator, scale).view(rows, WIDTH)

    logprobs_BT = (-noise(1.0).abs() - 0.1).requires_grad_()
    old_BT = logprobs_BT.detach() + noise(0.2)
    reference_BT = old_BT + noise(0.2)
    recipe = Recipe(algorithm(**axes), "none", MAX_TOKENS)
    group_B = torch.arange(GROUPS).repeat_interleave(GROUP_SIZE)
    rewards_B = torch.randint(0, 2, (rows,), generator=generator).double() + noise(0.01)[:, 0]
    prepared = recipe.prepare(rewards_B, group_B, lengths_B, "oracle")

    ours = recipe.loss(
        CompletionBatch(
            logprobs_N=logprobs_BT[mask_BT],
            old_logprobs_N=old_BT[mask_BT],
            behaviour_logprobs_N=old_BT[mask_BT],
            reference_logprobs_N=reference_BT[mask_BT],
            entropy_N=None,
            loss_mask_N=torch.ones(int(lengths_B.sum()), dtype=torch.bool),
            lengths_B=lengths_B,
            advantages_B=prepared.advantages_B,
            token_weights_B=prepared.token_weights_B,
            prefix_counts_N=None,
        )
    ).loss
    theirs = trl_loss(
        trl_trainer,
        settings,
        logprobs_BT,
        {
            "prompt_ids": torch.zeros(rows, 1, dtype=torch.long),
            "prompt_mask": torch.ones(rows, 1),
            "completion_ids": torch.zeros(rows, WIDTH, dtype=torch.long),
            "completion_mask": mask_BT.double(),
            "advantages": prepared.advantages_B,
            "old_per_token_logps": old_BT,
            "ref_per_token_logps": reference_BT,
            "num_items_in_batch": lengths_B.sum(),
        },
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-9)
    gradients = [torch.autograd.grad(loss, logprobs_BT)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-9)
