"""The critic on the real learner: its numbers, its learning, its checkpoints, its ranks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from learner_models import save_tiny_model, trajectories
from learner_ranks import SHAPES, make_worker, on_ranks, untimed, weights, worker

from common.config.algorithm import (
    AdvantageConfig,
    AlgorithmConfig,
    BaselineConfig,
    CriticConfig,
    ObjectiveConfig,
)
from common.errors import NumbersError, UserError
from common.record.credit_log import read_credit
from learner.policy.step_batch import StepBatch
from learner.training.rank import LearnerRank

CRITIC = CriticConfig(learning_rate=1e-3)
QUICK = {"learning_rate": 1e-2, "value_clip": float("inf"), "pretrain_steps": 12}
PPO = AlgorithmConfig(
    baseline=BaselineConfig(kind="none"),
    advantage=AdvantageConfig(kind="gae", critic=CRITIC),
)


def with_critic(**changes: Any) -> AlgorithmConfig:
    return replace(PPO, advantage=replace(PPO.advantage, critic=replace(CRITIC, **changes)))


@pytest.fixture(scope="module", params=["qwen2", "llama_untied"])
def folder(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("policy"), request.param)


def values_of(made: LearnerRank, seed: int = 0) -> np.ndarray:
    trainer = made.trainer
    assert trainer.critic is not None
    batch = StepBatch.from_record_batches(trajectories(SHAPES, seed=seed))
    values = trainer.critic.values(batch, trainer._packed).values
    assert values is not None
    return values


def test_values_are_those_of_the_untouched_model_with_the_head(folder: Path) -> None:
    """Against transformers, sequence by sequence: the state before a token is that before it."""
    from transformers import AutoModelForCausalLM

    groups = trajectories(SHAPES)
    with worker(folder, algorithm=PPO) as made:
        assert (values_of(made) == 0).all()  # nothing is known yet
        head = made.trainer.critic.critic.head
        torch.manual_seed(0)
        weight_H = torch.randn(head.weight.shape)
        with torch.no_grad():
            head.weight.copy_(_like(weight_H, head.weight))
        values = values_of(made)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected = []
    for row in (row for group in groups for row in group.to_pylist()):
        ids = torch.tensor([row["prompt_ids"] + row["token_ids"]])
        with torch.no_grad():
            hidden = model.model(ids).last_hidden_state[0, len(row["prompt_ids"]) - 1 : -1]
        expected += (hidden @ weight_H).tolist()
    np.testing.assert_allclose(values, expected, atol=1e-4)


def test_the_credit_log_has_the_values_from_which_advantages_came(
    folder: Path, tmp_path: Path
) -> None:
    with worker(folder, algorithm=PPO) as made:
        made.step(trajectories(SHAPES), 0, 0)
        before = values_of(made, seed=1)
        made.step(trajectories(SHAPES, seed=1, version=1), 1, 0, str(tmp_path))
        after = values_of(made, seed=1)
    logged = read_credit(tmp_path, 2)["values"].to_pylist()
    assert np.concatenate(logged).astype(np.float32).tolist() == before.tolist()
    assert np.abs(before - after).max() > 0
    with worker(folder) as made:
        made.step(trajectories(SHAPES), 0, 0, str(tmp_path))
    assert read_credit(tmp_path, 1)["values"].null_count == sum(len(each) for _, each in SHAPES)


def _like(value: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, parameter.device_mesh, parameter.placements)


def test_it_learns_what_a_state_is_worth(folder: Path) -> None:
    """On one batch again and again, whose rewards follow the prompt."""
    rewards = [[float(g % 2)] * len(sizes) for g, (_, sizes) in enumerate(SHAPES)]
    steps = []
    with worker(folder, algorithm=with_critic(**QUICK)) as made:
        for version in range(12):
            groups = trajectories(SHAPES, version=version, rewards=rewards)
            steps.append(made.step(groups, version, 0))
    assert steps[0]["critic/explained_variance"] == pytest.approx(0.0, abs=1e-6)
    assert steps[-1]["critic/explained_variance"] > 0.8
    assert steps[-1]["critic/loss"] < 0.2 * steps[0]["critic/loss"]


def test_in_the_first_steps_the_critic_learns_alone(folder: Path) -> None:
    with worker(folder, algorithm=with_critic(pretrain_steps=2)) as made:
        before = weights(made)
        for version in range(2):
            found = made.step(trajectories(SHAPES, version=version), version, 0)
            assert found["grad_norm"] == 0 and found["learning_rate"] == 0
            assert found["tokens/trained"] == 0 and found["critic/grad_norm"] > 0
        held = weights(made)
        assert all(torch.equal(held[name], value) for name, value in before.items())
        assert np.abs(values_of(made)).max() > 0
        found = made.step(trajectories(SHAPES, version=2), 2, 0)
        assert found["grad_norm"] > 0 and found["tokens/trained"] > 0
        moved = weights(made)
        assert not all(torch.equal(moved[name], value) for name, value in before.items())


def test_a_group_of_equal_rewards_teaches_both(folder: Path) -> None:
    """Also where the reward is what the critic says: only then the policy has no signal."""
    nothing = [[0.0] * len(sizes) for _, sizes in SHAPES]
    equal = [[1.0] * len(sizes) for _, sizes in SHAPES]
    unwhitened = replace(PPO, advantage=replace(PPO.advantage, args={"whiten": False}))
    with worker(folder, algorithm=unwhitened) as made:
        found = made.step(trajectories(SHAPES, rewards=nothing), 0, 0)
        assert found["grad_norm"] == 0 and found["critic/grad_norm"] == 0
        assert found["critic/loss"] == 0
        found = made.step(trajectories(SHAPES, rewards=equal, version=1), 1, 0)
        assert found["grad_norm"] > 0 and found["critic/grad_norm"] > 0


def test_every_update_of_the_policy_is_one_of_the_critic(folder: Path) -> None:
    """Two epochs of two parts; a clip of 0 stops the critic behind the first of each."""
    algorithm = replace(with_critic(), objective=ObjectiveConfig(epochs=2, updates_per_batch=2))
    with worker(folder, algorithm=algorithm) as made:
        made.step(trajectories(SHAPES), 0, 0)
        (optimizer,) = made.trainer.critic.optimizers
        head = made.trainer.critic.critic.head.weight
        assert float(optimizer.state[head]["step"]) == 4


def save(made: LearnerRank, target: Path) -> None:
    made.take_checkpoint({"version": 1})
    made.write_checkpoint(str(target))


def test_a_resume_is_bitwise_the_unbroken_run(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "step-2"
    config = with_critic(pretrain_steps=1)
    with worker(folder, algorithm=config) as made:
        for version in range(2):
            made.step(trajectories(SHAPES, seed=version, version=version), version, 0)
        save(made, target)
        unbroken = made.step(trajectories(SHAPES, seed=7, version=2), 2, 0), values_of(made)
    with worker(folder, algorithm=config) as made:
        torch.manual_seed(99)
        made.load_checkpoint(str(target))
        resumed = made.step(trajectories(SHAPES, seed=7, version=2), 2, 0), values_of(made)
    assert untimed(resumed[0]) == untimed(unbroken[0])
    assert (resumed[1] == unbroken[1]).all() and np.abs(resumed[1]).max() > 0


def test_a_checkpoint_without_a_critic_is_refused_and_one_with_it_goes_on_without(
    folder: Path, tmp_path: Path
) -> None:
    with worker(folder) as made:
        made.step(trajectories(SHAPES), 0, 0)
        save(made, tmp_path / "plain")
    with worker(folder, algorithm=PPO) as made:
        with pytest.raises(UserError, match="written without a critic"):
            made.load_checkpoint(str(tmp_path / "plain"))
        made.step(trajectories(SHAPES), 0, 0)
        save(made, tmp_path / "with")
        expected = weights(made)
    with worker(folder) as made:
        made.load_checkpoint(str(tmp_path / "with"))
        found = weights(made)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def _rank(rank: int, ranks: int, folder: Path, target: Path):
    made = make_worker(folder, rank, ranks, algorithm=PPO)
    return made, _TwoSteps(target)


class _TwoSteps:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __call__(self, made: LearnerRank) -> list[dict[str, float]]:
        made.load_checkpoint(str(self.target))
        groups = [trajectories(SHAPES, seed=s, version=1) for s in range(2)]
        return [untimed(made.step(each, 1 + s, s)) for s, each in enumerate(groups)]


def test_two_ranks_go_on_from_the_checkpoint_of_one_as_it_does(
    folder: Path, tmp_path: Path
) -> None:
    target = tmp_path / "step-1"
    with worker(folder, algorithm=PPO) as made:
        made.step(trajectories(SHAPES), 0, 0)
        save(made, target)
    with worker(folder, algorithm=PPO) as made:
        alone = _TwoSteps(target)(made)
    both = on_ranks(2, _rank, folder, target)
    for step in range(2):
        first, second = (each[step] for each in both)
        assert first == second
        for name in ("critic/loss", "critic/grad_norm", "critic/explained_variance", "grad_norm"):
            assert first[name] == pytest.approx(alone[step][name], rel=2e-3, abs=1e-5), name


def test_a_critic_without_numbers_is_named_before_anything_is_trained(folder: Path) -> None:
    with worker(folder, algorithm=PPO) as made:
        with torch.no_grad():
            made.trainer.critic.critic.head.weight.fill_(float("nan"))
        before = weights(made)
        with pytest.raises(NumbersError, match="critic gives values that are not finite"):
            made.step(trajectories(SHAPES), 0, 0)
        after = weights(made)
        assert all(torch.equal(after[name], value) for name, value in before.items())


def test_another_rule_may_be_judged_but_none_that_needs_a_critic(folder: Path) -> None:
    from learner.algorithm.recipe import Recipe

    batch = StepBatch.from_record_batches(trajectories(SHAPES))
    with worker(folder, algorithm=PPO) as made:
        trainer = replace(made.trainer, recipe=Recipe(AlgorithmConfig(), "tis", 48))
        assert trainer.probe(batch)["grad_norm"] > 0
    with worker(folder) as made:
        trainer = replace(made.trainer, recipe=Recipe(PPO, "tis", 48))
        with pytest.raises(UserError, match="goes by a critic"):
            trainer.probe(batch)


def test_memory_is_counted_as_it_is(folder: Path) -> None:
    """The critic's weights and AdamW's moments, against what `plan` adds for it."""
    from learner.training.memory import LearnerLoad, OtherModels, learner_memory
    from learner.training.ways import shape_of

    with worker(folder, algorithm=PPO) as made:
        made.step(trajectories(SHAPES), 0, 0)
        trainer = made.trainer
        shape = shape_of(trainer.policy)
        (optimizer,) = trainer.critic.optimizers
        tensors = [p.full_tensor() for p in trainer.critic.critic.policy.model.parameters()]
        tensors += [v for s in optimizer.state.values() for v in s.values() if v.ndim]
        held = sum(each.numel() * each.element_size() for each in tensors)
    assert shape is not None
    load = LearnerLoad(shards=1, tokens=64, logits_mib=1.0, recompute=False)
    both, alone = (
        learner_memory(shape, replace(load, others=OtherModels(critic=c))).kept
        for c in (True, False)
    )
    without_head = 0 if shape.tied else 12 * shape.embedding  # plan counts it, to be safe
    assert held == pytest.approx(both - alone - without_head, rel=0.02)
