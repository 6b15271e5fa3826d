"""DisCO's constraint: the divergence of all tokens of an update, by autograd and over any split."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from learner_models import save_tiny_model, trajectories
from learner_ranks import make_worker, on_ranks, weights, worker
from maths_oracles import algorithm, random_batch
from torch import Tensor

from common.config.algorithm import AlgorithmConfig
from learner.algorithm.choices import TokenColumns, divergence
from learner.algorithm.loss import CompletionBatch, anchor_logprobs, policy_loss
from learner.algorithm.objectives import OBJECTIVES, uses_ratio
from learner.training.rank import LearnerRank

SHAPES = [(9, [5, 12, 3, 7]), (4, [20, 2]), (6, [10] * 4)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


def constrained(**objective: Any) -> AlgorithmConfig:
    return algorithm(objective={"kind": "disco", **objective})


def asked(batch: CompletionBatch, config: AlgorithmConfig) -> CompletionBatch:
    """`batch` with what the step tells the rule of every token."""
    mask_N = batch.loss_mask_N
    spread_N = [
        values_B.repeat_interleave(batch.lengths_B)
        for values_B in (batch.advantages_B, batch.token_weights_B)
    ]
    entropy_N = batch.entropy_N
    assert entropy_N is not None
    rows = [
        batch.logprobs_N.detach(),
        batch.old_logprobs_N,
        batch.behaviour_logprobs_N,
        entropy_N,
        *spread_N,
    ]
    chooser = OBJECTIVES.chooser(config.objective)
    assert chooser is not None
    told_N = torch.zeros_like(rows[0])
    told_N[mask_N] = chooser(TokenColumns(*(row[mask_N] for row in rows)))
    return replace(batch, objective_chosen_N=told_N)


def gradient(loss: Tensor, batch: CompletionBatch) -> Tensor:
    return torch.autograd.grad(loss, batch.logprobs_N)[0]


@pytest.mark.parametrize("anchor", ["old", "behaviour"])
@pytest.mark.parametrize("seed", range(4))
def test_value_and_gradient_are_those_of_the_penalised_loss(seed: int, anchor: str) -> None:
    """Straight from the definition: -sum w A log pi + beta sg[max(K - delta, 0)] K."""
    config = constrained(anchor=anchor, args={"beta": 50.0, "delta": 0.01})
    batch = random_batch(seed, [5, 1, 9])
    mask_N = batch.loss_mask_N
    anchor_N = anchor_logprobs(batch, config.objective)
    batch = replace(batch, logprobs_N=(anchor_N - 0.3).requires_grad_())  # K > 0 on every seed
    ours = policy_loss(asked(batch, config), config, "none").loss
    advantages_N, weights_N = (
        values_B.repeat_interleave(batch.lengths_B)[mask_N]
        for values_B in (batch.advantages_B, batch.token_weights_B)
    )
    logprobs_N = batch.logprobs_N[mask_N]
    divergence_ = (anchor_N[mask_N] - logprobs_N).mean()
    penalty = 50.0 * (divergence_ - 0.01).clamp(min=0).detach() * divergence_
    theirs = -(weights_N * advantages_N * logprobs_N).sum() + penalty
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient(ours, batch), gradient(theirs, batch))
    assert penalty.item() > 1


def test_within_the_bound_it_is_gpg_without_its_alpha() -> None:
    batch = random_batch(0, [5, 1, 9])
    batch = replace(batch, logprobs_N=(batch.old_logprobs_N + 0.2).requires_grad_())
    config = constrained()
    ours = policy_loss(asked(batch, config), config, "none")
    theirs = policy_loss(batch, algorithm(objective={"kind": "gpg"}), "none").loss
    assert torch.equal(gradient(ours.loss, batch), gradient(theirs, batch))
    assert ours.metrics["clip_fraction"][0] == 0


def test_the_pull_by_hand() -> None:
    """K = (0.3 - 0.1) / 2 = 0.1; 10 (0.1 - 0.05) over two tokens of weights 0.5 and 0.25."""
    rows = torch.tensor(
        [[-1.3, -0.9], [-1.0, -1.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0], [0.5, 0.25]],
        dtype=torch.float64,
    )
    found = divergence(TokenColumns(*rows), constrained().objective, beta=10.0, delta=0.05)
    assert found.tolist() == pytest.approx([0.5, 1.0])
    none = divergence(TokenColumns(*rows), constrained().objective, beta=10.0, delta=0.1 + 1e-9)
    assert none.tolist() == [0, 0]
    empty = TokenColumns(*torch.zeros(6, 0, dtype=torch.float64))
    assert divergence(empty, constrained().objective, beta=10.0, delta=0.05).shape == (0,)


def test_completions_without_an_advantage_count() -> None:
    """The last group's rewards are equal: no advantage, and their tokens are in the mean."""
    assert OBJECTIVES.chooses_of_all(constrained().objective)
    assert not OBJECTIVES.chooses_of_all(algorithm().objective)


def test_the_constraint_is_a_use_of_the_ratio() -> None:
    assert uses_ratio(constrained().objective)
    assert not uses_ratio(constrained(args={"beta": 0.0}).objective)


def moved(folder: Path, beta: float, **changes: Any) -> tuple[dict[str, float], dict[str, Tensor]]:
    config = constrained(args={"beta": beta}, updates_per_batch=3)
    with worker(folder, algorithm=config, learning_rate=0.03, **changes) as made:
        metrics = made.step(trajectories(SHAPES), 0, 0)
        return metrics, weights(made)


def test_it_acts_from_the_second_update_on(folder: Path) -> None:
    free, held = moved(folder, 0.0), moved(folder, 1e3)
    assert free[0]["clip_fraction"] == 0
    assert 0 < held[0]["clip_fraction"] < 1
    assert any(not torch.equal(held[1][name], tensor) for name, tensor in free[1].items())


@pytest.mark.parametrize("tokens", [32])
def test_a_step_does_not_depend_on_its_micro_batches(folder: Path, tokens: int) -> None:
    found = [moved(folder, 1.0, tokens_per_microbatch=budget)[1] for budget in (tokens, 512)]
    for name, tensor in found[0].items():
        np.testing.assert_allclose(tensor, found[1][name], rtol=1e-4, atol=1e-4)


def _step(made: LearnerRank) -> dict[str, np.ndarray]:
    made.step(trajectories(SHAPES), 0, 0)
    return {name: tensor.numpy() for name, tensor in weights(made).items()}


def _target(rank: int, ranks: int, folder: Path) -> tuple[LearnerRank, Any]:
    config = constrained(args={"beta": 1.0}, updates_per_batch=3)
    return make_worker(folder, rank, ranks, algorithm=config), _step


def test_two_ranks_have_the_same_divergence_as_one(folder: Path) -> None:
    one, two = on_ranks(1, _target, folder), on_ranks(2, _target, folder)
    for name, tensor in one[0].items():
        np.testing.assert_allclose(two[0][name], tensor, rtol=1e-4, atol=1e-5)
