"""Several updates of one batch, and ratios to the sampler: what they reduce to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from learner_models import save_tiny_model, trajectories
from learner_ranks import make_worker, on_ranks, weights, worker
from maths_oracles import algorithm, random_batch

from common.config.algorithm import AlgorithmConfig
from common.errors import UserError
from learner.algorithm.loss import policy_loss
from learner.algorithm.recipe_checks import check_recipe
from learner.policy.packing import pack_row
from learner.policy.step_batch import StepBatch
from learner.training.rank import LearnerRank
from learner.training.work import parts_of

SHAPES = [(9, [5, 12, 3, 7]), (4, [20, 2]), (6, [10] * 4)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


@contextmanager
def uncorrected(folder: Path, algorithm: AlgorithmConfig, **changes: Any) -> Iterator[LearnerRank]:
    """A learner whose job has no off-policy correction."""
    job = make_worker(folder, **changes)._job
    job = replace(job, algorithm=algorithm, correction_kind="none")
    made = LearnerRank(job, 0, put=lambda buffer: buffer)
    made.setup(*made.rendezvous_address())
    try:
        yield made
    finally:
        made.shutdown()


def sampled_by_the_policy(made: LearnerRank) -> StepBatch:
    """A batch whose behaviour log-probabilities are the learner's own, to the bit."""
    batch = StepBatch.from_record_batches(trajectories(SHAPES))
    logprobs = batch.behaviour_logprobs.copy()
    for completion, group in enumerate(batch.group_B):
        ids = batch.token_ids[batch.tokens_of(completion)]
        row = pack_row([(batch.prompts[group], [ids])], [0], torch.device("cpu"))
        with torch.no_grad():
            scored = made.trainer.policy.logprobs(row, temperature=made.trainer.job.temperature)[0]
        logprobs[batch.tokens_of(completion)] = scored.numpy()
    return replace(batch, behaviour_logprobs=logprobs)


def of_groups(batch: StepBatch, groups: set[int]) -> StepBatch:
    """`batch`, where the other groups' completions have no reward and so no part in anything."""
    rewards_B = batch.rewards_B.copy()
    rewards_B[~np.isin(batch.group_B, list(groups))] = np.nan
    return replace(batch, rewards_B=rewards_B)


@pytest.mark.parametrize("updates", [1, 2, 3, 7])
def test_parts_are_disjoint_whole_groups_and_all_there(updates: int) -> None:
    batch = StepBatch.from_record_batches(trajectories(SHAPES))
    parts = parts_of(batch, updates)
    assert len(parts) == min(updates, 3)
    assert (np.sum(parts, axis=0) == 1).all()
    for part in parts:
        inside = set(batch.group_B[part])
        assert not inside & set(batch.group_B[~part])


def test_two_updates_are_two_steps_with_the_ratio_to_the_policy_before_the_first(
    folder: Path,
) -> None:
    """The second step's own pi_old has moved; the sampler's log-probabilities have not."""
    both = AlgorithmConfig()
    both.objective.updates_per_batch = 2
    apart = AlgorithmConfig()
    apart.objective.anchor = "behaviour"
    changes: dict[str, Any] = {"learning_rate": 0.03, "tokens_per_microbatch": 512}
    with uncorrected(folder, algorithm=both, **changes) as made:
        batch = sampled_by_the_policy(made)
        metrics = made.trainer.train(batch)
        together = weights(made)
    with uncorrected(folder, algorithm=apart, **changes) as made:
        made.trainer.train(of_groups(batch, {0, 1}))
        second = made.trainer.train(of_groups(batch, {2}))
        one_by_one = weights(made)
    assert second["clip_fraction"] > 0  # else the test would not see a wrong anchor
    assert metrics["grad_norm"] == pytest.approx(second["grad_norm"], rel=1e-5)  # of the last
    for name, tensor in together.items():
        gap = (tensor - one_by_one[name]).abs()
        # AdamW divides by a gradient's own size, so rounding moves some elements further.
        assert gap.max() < 1e-3 and gap.mean() < 1e-6, name


def test_a_clip_acts_from_the_second_update_on(folder: Path) -> None:
    config = AlgorithmConfig()
    config.objective.updates_per_batch = 3
    with worker(folder, learning_rate=0.03, algorithm=AlgorithmConfig()) as made:
        assert made.step(trajectories(SHAPES), 0, 0)["clip_fraction"] == 0
    with worker(folder, learning_rate=0.03, algorithm=config) as made:
        assert made.step(trajectories(SHAPES), 0, 0)["clip_fraction"] > 0


def _two_updates(made: LearnerRank) -> dict[str, np.ndarray]:
    made.step(trajectories(SHAPES), 0, 0)
    return {name: tensor.numpy() for name, tensor in weights(made).items()}


def _target(rank: int, ranks: int, folder: Path) -> tuple[LearnerRank, Any]:
    config = AlgorithmConfig()
    config.objective.updates_per_batch = 2
    return make_worker(folder, rank, ranks, algorithm=config), _two_updates


def test_two_ranks_make_the_same_updates_as_one(folder: Path) -> None:
    one, two = on_ranks(1, _target, folder), on_ranks(2, _target, folder)
    for name, tensor in one[0].items():
        np.testing.assert_allclose(two[0][name], tensor, rtol=1e-4, atol=1e-5)


def test_the_learned_preference_follows_every_update(folder: Path) -> None:
    config = AlgorithmConfig()
    config.aggregation.kind = "lambda_grpo"
    config.objective.updates_per_batch = 3
    with worker(folder, algorithm=config) as made:
        seen = []
        learn = made.trainer.recipe.end_step
        made.trainer.recipe.end_step = lambda sums: seen.append(learn(sums)) or seen[-1]  # type: ignore[method-assign]
        made.step(trajectories(SHAPES), 0, 0)
    assert len(seen) == 3
    # The last group's answers are all of one length, which says nothing of a preference.
    assert seen[0]["lambda_grpo/lambda"] != seen[1]["lambda_grpo/lambda"]
    assert seen[2]["lambda_grpo/gradient"] == 0


@pytest.mark.parametrize(
    ("changes", "correction", "message"),
    [
        ({}, "tis", r"anchor=behaviour .*correction\.kind=tis"),
        ({"credit": {"kind": "lambda_trace", "cut": True}}, "none", "credit.cut=true"),
    ],
)
def test_what_would_count_the_sampler_twice_is_refused(
    changes: dict[str, Any], correction: str, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        check_recipe(algorithm(objective={"anchor": "behaviour"}, **changes), correction)


OBJECTIVES = ["ppo", "gspo", "gmpo", "cispo", "gpg", "sapo", "dppo", "vespo", "dro"]


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_on_policy_both_anchors_have_the_same_gradient(kind: str) -> None:
    """At mu = pi_old = pi bitwise; `behaviour` takes no correction, and needs none here."""
    batch = random_batch(0, [3, 9, 1], on_policy=True)
    found = []
    for anchor in ("old", "behaviour"):
        config = algorithm(objective={"kind": kind, "anchor": anchor})
        loss = policy_loss(batch, config, "none").loss
        found.append(torch.autograd.grad(loss, batch.logprobs_N)[0])
    assert torch.equal(*found)


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_the_anchor_behaviour_is_old_fed_with_the_samplers_log_probabilities(kind: str) -> None:
    batch = random_batch(1, [3, 9, 1])
    given_N = batch.behaviour_logprobs_N.isnan()
    fed_N = torch.where(given_N, batch.old_logprobs_N, batch.behaviour_logprobs_N)
    ours = policy_loss(batch, algorithm(objective={"kind": kind, "anchor": "behaviour"}), "none")
    fed = replace(batch, old_logprobs_N=fed_N)
    theirs = policy_loss(fed, algorithm(objective={"kind": kind}), "none")
    assert torch.equal(ours.loss, theirs.loss)
