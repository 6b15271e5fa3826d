"""Scorers on the real learner: what they say, on how many ranks, and when it is no number."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from learner_models import save_tiny_model, trajectories
from learner_ranks import SHAPES, make_worker, on_ranks, untimed, worker

from common.config.algorithm import AdvantageConfig, AlgorithmConfig, ObjectiveConfig
from common.errors import NumbersError, UserError
from common.record.credit_log import read_scores
from learner.policy.model import Policy
from learner.training import scoring
from learner.training.rank import LearnerRank
from learner.training.scoring import score_tokens

BY_TEACHER = AlgorithmConfig(advantage=AdvantageConfig(kind="distill", scorer="teacher"))
BY_REFERENCE = AlgorithmConfig(advantage=AdvantageConfig(kind="flow", scorer="reference"))


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("teacher"), "llama_untied")


def test_scores_are_the_teachers_log_probabilities(
    policy: Path, teacher: Path, tmp_path: Path
) -> None:
    """Against the untouched teacher of transformers, sequence by sequence."""
    from transformers import AutoModelForCausalLM

    groups = trajectories(SHAPES)
    with worker(policy, algorithm=BY_TEACHER, teacher=str(teacher)) as made:
        made.step(groups, 0, 0, str(tmp_path))
    scores = read_scores(tmp_path, 1)
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    for row in (row for group in groups for row in group.to_pylist()):
        ids = torch.tensor([row["prompt_ids"] + row["token_ids"]])
        with torch.no_grad():
            logits = model(ids).logits[0, len(row["prompt_ids"]) - 1 : -1] / 0.9
        expected = logits.log_softmax(-1).gather(1, ids[0, len(row["prompt_ids"]) :, None])[:, 0]
        found = scores[row["group_id"], row["completion_index"]]
        np.testing.assert_allclose(found, expected.numpy(), atol=2e-5)


def _rank(rank: int, ranks: int, policy: Path, teacher: Path):
    made = make_worker(policy, rank, ranks, algorithm=BY_TEACHER, teacher=str(teacher))
    return made, _step


def _step(made: LearnerRank) -> dict[str, float]:
    return untimed(made.step(trajectories(SHAPES), 0, 0))


def test_two_ranks_train_under_a_teacher_as_one_does(policy: Path, teacher: Path) -> None:
    with worker(policy, algorithm=BY_TEACHER, teacher=str(teacher)) as made:
        alone = _step(made)
    first, second = on_ranks(2, _rank, policy, teacher)
    for name in ("scorer/gap", "grad_norm", "loss/policy", "tokens/trained"):
        assert first[name] == second[name]
        assert first[name] == pytest.approx(alone[name], rel=1e-4), name
    assert alone["grad_norm"] > 0


def test_the_model_that_the_run_began_from_stays_as_it_was(policy: Path, tmp_path: Path) -> None:
    """It says the same of the same tokens after the policy has moved."""
    with worker(policy, algorithm=BY_REFERENCE, correction_kind="none") as made:
        for version in range(2):
            made.step(trajectories(SHAPES, version=version), version, 0, str(tmp_path))
    first, second = (read_scores(tmp_path, step) for step in (1, 2))
    for key, values in first.items():
        np.testing.assert_array_equal(values, second[key])


def test_a_reference_that_scores_and_is_in_the_reward_reads_a_step_once(
    policy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[Policy] = []

    def counted(of: Policy, *rest: Any) -> Any:
        passes.append(of)
        return score_tokens(of, *rest)

    monkeypatch.setattr(scoring, "score_tokens", counted)
    in_reward = ObjectiveConfig(kl=0.1, kl_in="reward")
    with worker(policy, algorithm=replace(BY_REFERENCE, objective=in_reward)) as made:
        found = made.step(trajectories(SHAPES), 0, 0)
        assert passes == [made.trainer.models.reference]
    assert found["scorer/gap"] != 0 and found["reward/kl_penalty"] != 0
    with worker(policy, algorithm=AlgorithmConfig(objective=in_reward)) as made:
        alone = made.step(trajectories(SHAPES), 0, 0)
    assert found["reward/kl_penalty"] == alone["reward/kl_penalty"]


def test_a_scorer_without_numbers_is_named_before_anything_is_trained(
    policy: Path, teacher: Path
) -> None:
    with worker(policy, algorithm=BY_TEACHER, teacher=str(teacher)) as made:
        scorer = made.trainer.models.teacher
        assert scorer is not None
        with torch.no_grad():
            scorer.head.weight.fill_(float("nan"))
        before = [p.full_tensor().clone() for p in made.trainer.policy.model.parameters()]
        with pytest.raises(NumbersError, match=r"scorer \(teacher\).* token 0 of completion 0"):
            made.step(trajectories(SHAPES), 0, 0)
        after = made.trainer.policy.model.parameters()
        assert all(torch.equal(a, b.full_tensor()) for a, b in zip(before, after, strict=True))


def test_without_the_teacher_and_its_scores_a_step_is_refused(policy: Path) -> None:
    with (
        worker(policy, algorithm=BY_TEACHER) as made,
        pytest.raises(UserError, match="does not hold that model"),
    ):
        made.step(trajectories(SHAPES), 0, 0)
