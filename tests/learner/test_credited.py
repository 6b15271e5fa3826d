"""Gradients of single completions under advantages of their tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
import torch
from learner_models import save_tiny_model, trajectories
from learner_ranks import on_policy, worker

from common.config.load import load_config
from common.config.sections import Config
from learner.algorithm.recipe import Recipe
from learner.policy.step_batch import StepBatch
from learner.training import fsdp
from learner.training.credit_sheet import CreditSheet
from learner.training.credited import SIZE, Credited, advantages_alone, sketch, sketched_gradients
from learner.training.rank import LearnerRank

RECIPES = Path(__file__).resolve().parents[2] / "deploy/configs/recipes"
SHAPES = [(9, [5, 12, 3, 7]), (4, [20, 2, 9]), (6, [10] * 4)]


@pytest.fixture(scope="module")
def rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LearnerRank]:
    with worker(save_tiny_model(tmp_path_factory.mktemp("tiny")), temperature=1.0) as made:
        yield made


@pytest.fixture(scope="module")
def groups(rank: LearnerRank) -> list[pa.RecordBatch]:
    return on_policy(rank, trajectories(SHAPES))


def config_of(recipe: str) -> Config:
    return load_config(
        [], ["model.path=m", f"recipe={recipe}", "algorithm.objective.kl=0"], RECIPES
    )


def cosine(one: npt.NDArray[np.float32], other: npt.NDArray[np.float32]) -> float:
    a, b = one.astype(np.float64), other.astype(np.float64)
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


@pytest.mark.parametrize(
    "recipe",
    [
        "grpo",
        "dapo",
        "gspo",
        "gmpo",
        "cispo",
        "gpg",
        "disco",
        "raft",
        "kl_cov",
        "m2po",
        "tempo",
        "grpo_lambda_recent",
        "grpo_lambda_recent_weight",
        "grpo_lambda_terminal",
        "grpo_lambda_cut",
    ],
)
def test_those_of_a_rules_own_credit_add_up_to_its_gradient(
    rank: LearnerRank, groups: list[pa.RecordBatch], recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the gradient that the trainer computes, traces, choices and all."""
    seen, clip = [], fsdp.clip_gradients

    def clip_gradients(model: torch.nn.Module, max_norm: float) -> float:
        seen.append(sketch((each.numel(), each.grad) for each in model.parameters()).numpy())
        return clip(model, max_norm)

    monkeypatch.setattr(fsdp, "clip_gradients", clip_gradients)
    config, sheet = config_of(recipe), CreditSheet()
    algorithm, kind = config.algorithm, config.correction_kind
    batch = StepBatch.from_record_batches(groups)
    replace(rank.trainer, recipe=Recipe(algorithm, kind, 48)).probe(batch, sheet)
    rows = sheet.record_batch(1, groups)
    assert rows is not None
    given = [
        Credited(i, row["token_weight"], np.nan_to_num(np.array(row["advantages"], np.float64)))
        for i, row in enumerate(rows.to_pylist())
        if row["advantages"] is not None
    ]
    alone = advantages_alone(algorithm, kind, 48)
    parts = sketched_gradients(rank.trainer, batch, alone, given)
    assert len(given) > 3 and len(seen) == 1
    assert cosine(parts.sum(0), seen[0]) > 1 - 1e-5
    assert np.linalg.norm(parts.sum(0)) == pytest.approx(np.linalg.norm(seen[0]), rel=1e-3)


def test_unknown_tokens_add_nothing_and_the_others_what_they_did(
    rank: LearnerRank, groups: list[pa.RecordBatch]
) -> None:
    batch = StepBatch.from_record_batches(groups)
    alone = advantages_alone(config_of("grpo").algorithm, "none", 48)
    random = np.random.default_rng(0)
    whole = random.normal(size=12)
    early, late, unknown = whole.copy(), whole.copy(), np.full(12, np.nan)
    early[5:], late[:5] = np.nan, 0.0
    found = [
        sketched_gradients(rank.trainer, batch, alone, [Credited(1, 0.5, each)])[0]
        for each in (whole, early, late, unknown)
    ]
    assert not found[3].any()
    assert np.abs(found[0]).max() > 1e-3
    np.testing.assert_allclose(found[1] + found[2], found[0], atol=2e-5 * np.abs(found[0]).max())


def test_a_sketch_keeps_inner_products() -> None:
    """Exactly where there is room for every entry; else but for its stated error."""
    generator = torch.Generator().manual_seed(1)

    def pair(*sizes: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        one = [torch.randn(size, generator=generator) for size in sizes]
        return one, [0.3 * each + torch.randn(len(each), generator=generator) for each in one]

    def of(parts: list[torch.Tensor]) -> npt.NDArray[np.float32]:
        return sketch((len(each), each) for each in parts).numpy()

    for sizes, error in (((1000, 7, 3000), 1e-6), ((SIZE + 5, 2 * SIZE, 3), 5e-3)):
        one, other = pair(*sizes)
        expected = cosine(torch.cat(one).numpy(), torch.cat(other).numpy())
        assert cosine(of(one), of(other)) == pytest.approx(expected, abs=error)
    ones = [torch.ones(4 * SIZE)]  # all alike: signs must not
    assert cosine(of(ones), of([-ones[0]])) == pytest.approx(-1)
    assert float((of(ones).astype(np.float64) ** 2).sum()) == pytest.approx(4 * SIZE, rel=0.02)


def test_a_parameter_without_a_gradient_is_one_of_zeros() -> None:
    values = torch.randn(50)
    found = sketch([(30, None), (50, values)])
    assert torch.equal(found, sketch([(30, torch.zeros(30)), (50, values)]))
