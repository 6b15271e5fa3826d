"""Choices among all tokens of an update: by hand, and whatever the micro-batches."""

from __future__ import annotations

import math
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from learner_models import save_tiny_model, trajectories
from learner_ranks import make_worker, on_ranks, weights, worker
from maths_oracles import algorithm, normal, random

from common.config.algorithm import AlgorithmConfig, CreditConfig, ObjectiveConfig
from learner.algorithm.choices import (
    TokenColumns,
    covariance,
    highest_covariance,
    second_moment,
    some_in_band,
    top_entropy,
)
from learner.algorithm.credit import CREDITS
from learner.training.rank import LearnerRank

SHAPES = [(9, [5, 12, 3, 7]), (4, [20, 2]), (6, [10] * 4)]


def columns(**given: list[float]) -> TokenColumns:
    size = len(next(iter(given.values())))
    filled = {each.name: given.get(each.name, [0.0] * size) for each in fields(TokenColumns)}
    return TokenColumns(**{k: torch.tensor(v, dtype=torch.float64) for k, v in filled.items()})


@pytest.mark.parametrize(("share", "kept"), [(0.2, 1), (0.21, 2), (0.4, 2), (1.0, 5), (0.01, 1)])
def test_the_highest_entropies_rounded_up(share: float, kept: int) -> None:
    entropy = [0.3, 0.9, 0.1, 0.5, 0.7]
    chosen = top_entropy(columns(entropy_M=entropy), None, share=share)
    assert [entropy[i] for i in chosen.nonzero()[:, 0]] == [
        e for e in entropy if e in sorted(entropy)[-kept:]
    ]


def test_a_share_of_fifteen_is_not_one_more_by_rounding() -> None:
    entropy = torch.arange(15).double().tolist()
    assert int(top_entropy(columns(entropy_M=entropy), None, share=0.2).sum()) == 3


def test_covariance_by_hand() -> None:
    """A - mean: -1, 1, 0; log pi - mean: 0.5, 0.5, -1."""
    found = columns(advantages_M=[0.0, 2.0, 1.0], logprobs_M=[-1.0, -1.0, -2.5])
    assert covariance(found).tolist() == pytest.approx([-0.5, 0.5, 0.0])
    assert highest_covariance(found, None, share=1e-4).tolist() == [False, True, False]
    assert highest_covariance(found, None, share=0.7).tolist() == [False, True, True]


def test_what_is_drawn_lies_in_the_band_and_is_not_clipped_anyway() -> None:
    generator = random(0)
    given = TokenColumns(*(normal(2000, generator) for _ in range(6)))
    config = ObjectiveConfig()
    chosen = some_in_band(given, config, share=0.01, lowest=0.5, highest=1.0)
    assert int(chosen.sum()) == 20
    cov = covariance(given)[chosen]
    assert ((cov > 0.5) & (cov < 1.0)).all()
    ratio = (given.logprobs_M - given.old_logprobs_M).exp()
    clipped = torch.where(given.advantages_M > 0, ratio > 1.2, ratio < 0.8)
    assert not (chosen & clipped).any()
    again = some_in_band(given, config, share=0.01, lowest=0.5, highest=1.0)
    assert torch.equal(chosen, again)
    none = some_in_band(given, config, share=0.01, lowest=50.0, highest=60.0)
    assert not none.any()


def test_the_second_moment_falls_below_its_limit_and_not_by_more_than_needed() -> None:
    old = [-1.0, -1.0, -1.0, -1.0, -1.0]
    sampler = [-1.1, -2.0, -1.3, math.nan, -0.8]  # squares .01, 1, .09, none, .04
    given = columns(old_logprobs_M=old, behaviour_logprobs_M=sampler)
    assert second_moment(given, None, limit=1.0).tolist() == [False] * 5
    assert second_moment(given, None, limit=0.1).tolist() == [False, True, False, False, False]
    assert second_moment(given, None, limit=0.03).tolist() == [False, True, True, False, False]
    assert second_moment(given, None, limit=1e-9).tolist() == [False, True, True, False, True]


def test_arguments_of_a_rule_reach_its_choice() -> None:
    given = columns(entropy_M=[0.1, 0.2, 0.3, 0.4])
    for args, kept in (({}, 1), ({"share": 0.5}, 2)):
        chooser = CREDITS.chooser(CreditConfig("top_entropy", args=args))
        assert chooser is not None
        assert int(chooser(given).sum()) == kept
    assert CREDITS.chooser(CreditConfig("broadcast")) is None


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


def choosing() -> AlgorithmConfig:
    """All three axes choose, and there are two updates a batch."""
    return algorithm(
        credit={"kind": "top_entropy", "args": {"share": 0.5}},
        objective={"kind": "kl_cov", "args": {"share": 0.2}, "updates_per_batch": 2},
        correction={"kind": "m2po", "args": {"limit": 0.2}},
    )


@pytest.mark.parametrize("tokens", [32, 512])
def test_a_step_does_not_depend_on_its_micro_batches(folder: Path, tokens: int) -> None:
    found = []
    for budget in (tokens, 128):
        changes = {"tokens_per_microbatch": budget, "correction_kind": "m2po"}
        with worker(folder, algorithm=choosing(), **changes) as made:
            made.step(trajectories(SHAPES), 0, 0)
            found.append(weights(made))
    for name, tensor in found[0].items():
        np.testing.assert_allclose(tensor, found[1][name], rtol=1e-4, atol=1e-5)


def _step(made: LearnerRank) -> dict[str, np.ndarray]:
    made.step(trajectories(SHAPES), 0, 0)
    return {name: tensor.numpy() for name, tensor in weights(made).items()}


def _target(rank: int, ranks: int, folder: Path) -> tuple[LearnerRank, Any]:
    return make_worker(folder, rank, ranks, algorithm=choosing(), correction_kind="m2po"), _step


def test_two_ranks_choose_the_same_tokens_as_one(folder: Path) -> None:
    one, two = on_ranks(1, _target, folder), on_ranks(2, _target, folder)
    for name, tensor in one[0].items():
        np.testing.assert_allclose(two[0][name], tensor, rtol=1e-4, atol=1e-5)


def test_all_of_the_tokens_is_grpo_bitwise(folder: Path) -> None:
    found = []
    every = algorithm(credit={"kind": "top_entropy", "args": {"share": 1.0}})
    for config in (every, algorithm()):
        with worker(folder, algorithm=config) as made:
            made.step(trajectories(SHAPES), 0, 0)
            found.append(weights(made))
    for name, tensor in found[0].items():
        assert torch.equal(tensor, found[1][name]), name
