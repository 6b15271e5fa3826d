"""Adapters beside an average and a critic: what is averaged, what is trained, what is sent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from learner_models import save_tiny_model, trajectories
from learner_ranks import SHAPES, make_worker, on_ranks, untimed, weights, worker
from torch import Tensor
from transformers import AutoModelForCausalLM

from common.config.algorithm import (
    AdvantageConfig,
    AlgorithmConfig,
    BaselineConfig,
    CriticConfig,
)
from common.config.sections import AdapterConfig
from common.record.credit_log import read_credit, read_scores
from learner.policy.adapters import adapter_parameters
from learner.policy.model import DTYPES, Policy
from learner.policy.step_batch import StepBatch
from learner.training import fsdp
from learner.training.memory import LearnerLoad, OtherModels, learner_memory
from learner.training.rank import LearnerRank
from learner.training.ways import shape_of

ADAPTER = AdapterConfig(rank=4, alpha=8)
SCALE = ADAPTER.alpha / ADAPTER.rank
QUICK = {"adapter": ADAPTER, "learning_rate": 1e-2}
PPO = AlgorithmConfig(
    baseline=BaselineConfig(kind="none"),
    advantage=AdvantageConfig(kind="gae", critic=CriticConfig(learning_rate=1e-2)),
)


def by_average(rate: float, **args: float) -> AlgorithmConfig:
    advantage = AdvantageConfig(kind="distill", scorer="ema", ema_rate=rate, args=args)
    return AlgorithmConfig(advantage=advantage)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"), "qwen2")


def step(made: LearnerRank, number: int, run: Path | None = None) -> dict[str, float]:
    groups = trajectories(SHAPES, seed=number, version=number)
    return made.step(groups, number, 0, None if run is None else str(run))


def whole(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().full_tensor().clone() for name, tensor in tensors.items()}  # type: ignore[operator]


def adapters_of(policy: Policy) -> dict[str, Tensor]:
    return whole(dict(adapter_parameters(policy)))


def merged(folder: Path, pairs: Mapping[str, Tensor]) -> Any:
    """The model of transformers at `folder`, its weights with `pairs` added by hand."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        for name, a in pairs.items():
            if name.endswith(".lora_A.weight"):
                layer = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
                b = pairs[name.replace("lora_A", "lora_B")]
                model.get_submodule(layer).weight += SCALE * (b @ a)
    return model


# A moving average


def test_each_matrix_is_averaged_and_the_scorer_is_their_product(
    folder: Path, tmp_path: Path
) -> None:
    """A_E = .7 A_E + .3 A after a step, B_E alike; scores are those of W + s B_E A_E."""
    with worker(folder, algorithm=by_average(0.3), **QUICK) as made:
        expected = adapters_of(made.trainer.policy)
        for number in range(2):
            step(made, number)
            now = adapters_of(made.trainer.policy)
            expected = {name: 0.7 * value + 0.3 * now[name] for name, value in expected.items()}
        average = made.trainer.models.averaged
        assert average is not None
        found = whole(average)
        step(made, 2, tmp_path)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-7)
    distance = max(float((now[name] - found[name]).abs().max()) for name in now)
    assert distance > 1e-3
    scores, model = read_scores(tmp_path, 3), merged(folder, expected)
    for row in (row for group in trajectories(SHAPES, seed=2) for row in group.to_pylist()):
        ids, start = torch.tensor([row["prompt_ids"] + row["token_ids"]]), len(row["prompt_ids"])
        with torch.no_grad():
            logits = model(ids).logits[0, start - 1 : -1] / 0.9
        said = logits.log_softmax(-1).gather(1, ids[0, start:, None])[:, 0]
        key = row["group_id"], row["completion_index"]
        np.testing.assert_allclose(scores[key], said.numpy(), atol=2e-5)


def test_an_average_of_rate_one_is_the_policy(folder: Path, tmp_path: Path) -> None:
    with worker(folder, algorithm=by_average(1.0), **QUICK) as made:
        step(made, 0)
        step(made, 1, tmp_path)
    scores, credit = read_scores(tmp_path, 2), read_credit(tmp_path, 2)
    for row in credit.to_pylist():
        said = scores[row["group_id"], row["completion_index"]]
        if row["logprobs"] is not None:
            np.testing.assert_allclose(said, row["logprobs"], atol=2e-5)


def test_lending_adapters_to_the_average_leaves_the_policy_as_it_was(folder: Path) -> None:
    """A scorer that counts for nothing: every step is GRPO's, bitwise."""
    idle = by_average(0.3, coefficient=0.0, reward_weight=1.0)
    found = []
    for algorithm in (idle, AlgorithmConfig()):
        with worker(folder, algorithm=algorithm, **QUICK) as made:
            norms = [step(made, number)["grad_norm"] for number in range(3)]
            found.append((norms, weights(made)))
    (mine, sent), (theirs, expected) = found
    assert mine == theirs and min(mine) > 0
    assert all(torch.equal(sent[name], value) for name, value in expected.items())


def _rank(rank: int, ranks: int, folder: Path):
    return make_worker(folder, rank, ranks, algorithm=by_average(0.3), **QUICK), _gaps


def _gaps(made: LearnerRank) -> list[float]:
    return [step(made, number)["scorer/gap"] for number in range(3)]


def test_two_ranks_average_as_one_does(folder: Path) -> None:
    with worker(folder, algorithm=by_average(0.3), **QUICK) as made:
        alone = _gaps(made)
    first, second = on_ranks(2, _rank, folder)
    assert first == second
    assert first == pytest.approx(alone, rel=1e-3)
    assert len(set(alone)) == 3


@pytest.mark.parametrize("algorithm", [by_average(0.3), PPO], ids=["average", "critic"])
def test_a_resume_from_merged_weights_is_bitwise_the_unbroken_run(
    folder: Path, tmp_path: Path, algorithm: AlgorithmConfig
) -> None:
    target = tmp_path / "step-2"
    with worker(folder, algorithm=algorithm, **QUICK) as made:
        step(made, 0)
        step(made, 1)
        made.take_checkpoint({})
        made.write_checkpoint(str(target))
        unbroken = [untimed(step(made, number)) for number in (2, 3)]
        sent = weights(made)
    with worker(target, algorithm=algorithm, reference=folder, **QUICK) as made:
        made.load_checkpoint(str(target))
        assert [untimed(step(made, number)) for number in (2, 3)] == unbroken
        assert all(torch.equal(each, sent[name]) for name, each in weights(made).items())


# A critic


def test_a_critic_trains_its_own_adapters_and_its_head(folder: Path) -> None:
    """Its values are those of its merged weights and its head, by the untouched model."""
    groups = trajectories(SHAPES, seed=0)
    with worker(folder, algorithm=PPO, **QUICK) as made:
        critic = made.trainer.critic
        assert critic is not None
        policy, head = critic.critic.policy, critic.critic.head.weight
        frozen = {n: p for n, p in policy.model.named_parameters() if not p.requires_grad}
        before = whole(frozen)
        for number in range(3):
            assert step(made, number)["critic/grad_norm"] > 0
        after, pairs = whole(frozen), adapters_of(policy)
        trained = [p for p in policy.model.parameters() if p.requires_grad]
        assert len(trained) == len(pairs) + 1
        assert all(torch.equal(after[name], value) for name, value in before.items())
        assert all(bool(value.any()) for value in pairs.values())
        theirs = adapters_of(made.trainer.policy)
        assert not any(torch.equal(theirs[name], pairs[name]) for name in pairs)
        batch = StepBatch.from_record_batches(groups)
        values = critic.values(batch, made.trainer._packed).values
        head_H = whole({"head": head})["head"]
    model, expected = merged(folder, pairs), list[float]()
    for row in (row for group in groups for row in group.to_pylist()):
        ids = torch.tensor([row["prompt_ids"] + row["token_ids"]])
        with torch.no_grad():
            hidden = model.model(ids).last_hidden_state[0, len(row["prompt_ids"]) - 1 : -1]
        expected += (hidden @ head_H).tolist()
    assert np.abs(expected).max() > 1e-3
    np.testing.assert_allclose(values, expected, atol=1e-4)


def test_the_memory_of_an_adapted_critic_is_counted_as_it_is(folder: Path) -> None:
    with worker(folder, algorithm=PPO, dtype="bfloat16", **QUICK) as made:
        step(made, 0)
        critic, shape = made.trainer.critic, shape_of(made.trainer.policy)
        assert critic is not None
        model, (optimizer,) = critic.critic.policy.model, critic.optimizers
        adapters = sum(value.numel() for value in adapters_of(critic.critic.policy).values())
        tensors = [p.detach().full_tensor() for p in model.parameters()]  # type: ignore[operator]
        tensors += [v for s in optimizer.state.values() for v in s.values() if v.ndim]
        held = sum(each.numel() * each.element_size() for each in tensors)
        held -= 12 * critic.critic.head.weight.numel()
    assert shape is not None
    load = LearnerLoad(shards=1, tokens=64, logits_mib=1.0, recompute=False, adapters=adapters)
    both, alone = (
        learner_memory(shape, replace(load, others=OtherModels(critic=c))).kept
        for c in (True, False)
    )
    assert held == pytest.approx(both - alone, rel=0.02)


# What is sent


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_transport_is_told_of_the_tensors_that_it_gets(folder: Path, dtype: str) -> None:
    """`nccl` and `ipc` announce shapes and types, and then send: merged, as of the base model."""
    with worker(folder, dtype=dtype) as made:
        plain = fsdp.PolicyWeights(made.trainer.policy, DTYPES[dtype]).shapes()
    with worker(folder, dtype=dtype, **QUICK) as made:
        step(made, 0)
        of = fsdp.PolicyWeights(made.trainer.policy, DTYPES[dtype])
        sent = [(name, each.dtype, tuple(each.shape)) for name, each in of.tensors()]
        assert of.shapes() == sent == plain
