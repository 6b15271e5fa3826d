"""Updates of their own for rare tokens (Lopti), ahead of those of the others."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from learner_models import save_tiny_model, trajectories
from learner_ranks import make_worker, on_ranks, weights, worker
from maths_oracles import algorithm, random_batch

from common.config.algorithm import AlgorithmConfig
from common.errors import UserError
from learner.algorithm.choices import token_shares
from learner.algorithm.loss import CompletionBatch, policy_loss
from learner.algorithm.recipe_checks import check_recipe
from learner.policy.step_batch import StepBatch
from learner.training.credit_sheet import CreditSheet
from learner.training.rank import LearnerRank

SHAPES = [(9, [5, 12, 3, 7]), (4, [20, 2]), (6, [10] * 4)]
SETTINGS: list[dict[str, dict[str, Any]]] = [
    {},
    {"objective": {"kl": 0.1, "entropy": 0.02}},
    {"objective": {"kind": "cispo"}, "credit": {"kind": "probability"}},
    {"credit": {"kind": "lambda_trace", "application": "weight"}},
    {"objective": {"kind": "dppo", "anchor": "behaviour"}},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


def isolating(bound: float | None, **objective: Any) -> AlgorithmConfig:
    return algorithm(objective={"isolate_below": bound, **objective})


def loss_and_gradient(
    batch: CompletionBatch, config: AlgorithmConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    loss = policy_loss(batch, config, "none").loss
    return loss.detach(), torch.autograd.grad(loss, batch.logprobs_N)[0]


@pytest.mark.parametrize("settings", SETTINGS)
def test_at_one_policy_both_updates_together_are_the_update_of_all(
    settings: dict[str, dict[str, Any]],
) -> None:
    config = algorithm(**settings)
    config.objective.isolate_below = 0.4
    batch = random_batch(3, [7, 1, 12])
    whole = loss_and_gradient(batch, config)
    halves = []
    for share in token_shares(config.objective):
        assert share is not None
        mine_N = share(batch.old_logprobs_N)
        assert mine_N.any() and not mine_N.all()  # else the test would see nothing
        loss, gradient = loss_and_gradient(replace(batch, update_N=mine_N), config)
        assert not gradient[~mine_N].any()
        halves.append((loss, gradient))
    for one, other, both in zip(*halves, whole, strict=True):
        torch.testing.assert_close(one + other, both, rtol=0, atol=1e-12)


def step(folder: Path, config: AlgorithmConfig, **changes: Any) -> dict[str, torch.Tensor]:
    with worker(folder, algorithm=config, **changes) as made:
        made.step(trajectories(SHAPES), 0, 0)
        return weights(made)


@pytest.mark.parametrize("bound", [1e-30, 1.0])
def test_an_update_without_a_token_is_none(folder: Path, bound: float) -> None:
    """All tokens are on one side of the border: bitwise the step without one, momentum included."""
    apart, plain = (step(folder, isolating(each), learning_rate=0.01) for each in (bound, None))
    for name, tensor in plain.items():
        assert torch.equal(tensor, apart[name]), name


def test_rare_tokens_go_first(folder: Path) -> None:
    """What the first update sees is rare, what the second sees is not, each token once."""
    with worker(folder, algorithm=isolating(0.02, updates_per_batch=2)) as made:
        seen: list[tuple[torch.Tensor, torch.Tensor]] = []
        loss = made.trainer.recipe.loss

        def watched(batch: CompletionBatch) -> Any:
            assert batch.update_N is not None
            seen.append((batch.old_logprobs_N.exp(), batch.update_N))
            return loss(batch)

        made.trainer.recipe.loss = watched  # type: ignore[method-assign]
        made.step(trajectories(SHAPES), 0, 0)
    half = len(seen) // 2
    assert len(seen) == 2 * half
    for (old_N, rare_N), (again_N, common_N) in zip(seen[:half], seen[half:], strict=True):
        assert torch.equal(old_N, again_N)  # the policy before the first update, for all of them
        assert torch.equal(rare_N, old_N < 0.02)
        assert torch.equal(common_N, ~rare_N)
    assert any(rare_N.any() and not rare_N.all() for _, rare_N in seen)


def test_the_clip_acts_on_common_tokens(folder: Path) -> None:
    """The rare ones have moved the policy by then."""
    changes: dict[str, Any] = {"learning_rate": 0.03}
    for bound, acts in ((0.02, True), (1.0, False)):
        with worker(folder, algorithm=isolating(bound), **changes) as made:
            assert (made.step(trajectories(SHAPES), 0, 0)["clip_fraction"] > 0) == acts


@pytest.mark.parametrize("kind", ["grpo_like", "choosing"])
def test_a_step_does_not_depend_on_its_micro_batches(folder: Path, kind: str) -> None:
    config = isolating(0.02, updates_per_batch=2)
    if kind == "choosing":
        config.credit = algorithm(credit={"kind": "top_entropy", "args": {"share": 0.5}}).credit
    found = [step(folder, config, tokens_per_microbatch=budget) for budget in (32, 512)]
    for name, tensor in found[0].items():
        np.testing.assert_allclose(tensor, found[1][name], rtol=1e-4, atol=1e-5)


def _step(made: LearnerRank) -> dict[str, np.ndarray]:
    made.step(trajectories(SHAPES), 0, 0)
    return {name: tensor.numpy() for name, tensor in weights(made).items()}


def _target(rank: int, ranks: int, folder: Path) -> tuple[LearnerRank, Any]:
    return make_worker(folder, rank, ranks, algorithm=isolating(0.02)), _step


def test_two_ranks_make_the_same_updates_as_one(folder: Path) -> None:
    one, two = on_ranks(1, _target, folder), on_ranks(2, _target, folder)
    for name, tensor in one[0].items():
        np.testing.assert_allclose(two[0][name], tensor, rtol=1e-4, atol=1e-5)


def _credit(folder: Path, bound: float | None) -> pa.RecordBatch:
    with worker(folder, algorithm=isolating(bound)) as made:
        sheet = CreditSheet()
        batches = trajectories(SHAPES)
        made.trainer.train(StepBatch.from_record_batches(batches), sheet)
        rows = sheet.record_batch(1, batches)
    assert rows is not None
    return rows


def test_the_credit_log_has_every_token_once(folder: Path) -> None:
    apart, plain = _credit(folder, 0.02), _credit(folder, None)
    assert apart.equals(plain)


@pytest.mark.parametrize(
    "axes",
    [
        {"objective": {"kind": "gspo"}},
        {"objective": {"kind": "gmpo"}},
        {"credit": {"kind": "lambda_trace"}},
    ],
)
def test_what_moves_whole_completions_is_refused(axes: dict[str, dict[str, Any]]) -> None:
    config = algorithm(**axes)
    config.objective.isolate_below = 0.4
    with pytest.raises(UserError, match=r"isolate_below=0\.4"):
        check_recipe(config, "none")
