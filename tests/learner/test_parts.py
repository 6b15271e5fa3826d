"""What the learner gets of groups with several parts, and how it trains on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from learner_models import VOCABULARY, save_tiny_model, trajectories
from learner_ranks import SHAPES, assert_same_training, moments, weights, worker

from common.config.algorithm import AlgorithmConfig
from common.errors import UserError
from common.record.parts import REPLACES
from common.record.segments import segment
from learner.algorithm.recipe_checks import check_recipe
from learner.policy.step_batch import StepBatch

Row = dict[str, Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


def changed(groups: list[pa.RecordBatch], change: Any) -> list[pa.RecordBatch]:
    found = []
    for group in groups:
        rows = group.to_pylist()
        for index, row in enumerate(rows):
            change(row, index)
        found.append(pa.RecordBatch.from_pylist(rows, schema=group.schema))
    return found


def trained(folder: Path, groups: list[pa.RecordBatch], **changes: Any) -> tuple[Any, Any, Any]:
    with worker(folder, **changes) as made:
        metrics = [made.step(groups, 0, 0, None)]
        exported = {name: tensor.float().numpy() for name, tensor in weights(made).items()}
        return metrics, exported, moments(made)


def other_prompt(row: Row, index: int) -> None:
    """Every other completion stands behind a prompt of its own, of one length or another."""
    if index % 2:
        random = np.random.default_rng(index)
        row["prompt_ids"] = random.integers(3, VOCABULARY, 2 + index).tolist()


def other_prompt_as_segment(row: Row, index: int) -> None:
    own = dict(row)
    other_prompt(own, index)
    if index % 2:
        row["segments"] = [segment(0, len(row["token_ids"]), own["prompt_ids"])]


def replacing(row: Row, index: int) -> None:
    row["part"], row["completion_index"] = REPLACES, index + 100


def test_drafts_do_not_reach_the_learner(folder: Path) -> None:
    """A group of drafts and what replaces them is the group of the latter, bitwise."""
    later = changed(trajectories(SHAPES), replacing)
    drafts = changed(trajectories(SHAPES, seed=7), lambda row, index: None)
    whole = [
        pa.concat_batches([first, second]) for first, second in zip(drafts, later, strict=True)
    ]
    assert_same_training(trained(folder, whole), trained(folder, later))


def test_completions_behind_prompts_of_their_own_train_behind_these(folder: Path) -> None:
    """As if each were an episode of one conversation with such a prompt, which packs alike."""
    groups = trajectories(SHAPES)
    apart = trained(folder, changed(groups, other_prompt))
    cut = trained(folder, changed(groups, other_prompt_as_segment))
    assert_same_training(apart, cut)


def test_one_prompt_for_all_of_a_group_is_the_plain_case(folder: Path) -> None:
    batch = StepBatch.from_record_batches(trajectories(SHAPES))
    assert batch.segmented is None
    assert batch.branches is None
    assert batch.elsewhere_B is None


def hinted(row: Row, index: int) -> None:
    row["sampled_behind"] = [3, 4, 5]
    row["behaviour_logprobs"] = [value - 2.0 for value in row["behaviour_logprobs"]]


@pytest.mark.parametrize("objective", ["ppo", "guide", "rgr"])
def test_the_gap_to_a_sampler_behind_another_prompt_is_no_gap_of_numbers(
    folder: Path, objective: str
) -> None:
    """Neither in the metrics nor as a correction; `guide` alone goes by it."""
    algorithm = AlgorithmConfig()
    algorithm.objective.kind = objective
    algorithm.correction.kind = "tis"
    plain = trained(folder, trajectories(SHAPES), algorithm=algorithm)
    behind = trained(folder, changed(trajectories(SHAPES), hinted), algorithm=algorithm)
    (before,), (after,) = plain[0], behind[0]
    assert before["logprob_gap/mean"] > 0
    assert after["logprob_gap/mean"] == 0.0
    # Guide's A r / (r + gamma) has at most a quarter of the gradient of A r.
    share = after["grad_norm"] / before["grad_norm"]
    # RGR's A pi / (pi_old + gamma) goes by probabilities, which are small here, behind the prompt.
    assert share > 0.5 if objective == "ppo" else share < 0.5


@pytest.mark.parametrize(
    "change",
    [
        {"rollout.overlong_penalty_share": 0.5},
        {"rollout.prune_rate": 0.5},
        {"rollout.max_variance_share": 0.5},
        {"rollout.consistency.weight": 0.5},
        {"objective.kind": "gpg"},
    ],
)
def test_values_of_branches_are_compared_with_the_reward_that_continuations_have(
    change: dict[str, Any],
) -> None:
    algorithm = AlgorithmConfig()
    algorithm.baseline.kind, algorithm.advantage.kind = "none", "branch_values"
    check_recipe(algorithm, "none")
    for key, value in change.items():
        *path, name = key.split(".")
        section: Any = algorithm
        for part in path:
            section = getattr(section, part)
        setattr(section, name, value)
    with pytest.raises(UserError, match="rewards of continuations"):
        check_recipe(algorithm, "none")
