"""Adapters: what is trained, what is published, and what a checkpoint of them holds."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from architectures import save_model
from learner_models import save_tiny_model, trajectories
from learner_ranks import (
    SHAPES,
    assert_same_training,
    make_worker,
    moments,
    on_ranks,
    train,
    train_work,
    untimed,
    weights,
    worker,
)
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from transformers import AutoModelForCausalLM, GPT2Config

from common.config.algorithm import AlgorithmConfig
from common.config.sections import AdapterConfig, ModelConfig, OptimizerConfig
from common.errors import UserError
from learner.policy.adapters import adapted, add_adapters, merge, pair_of
from learner.policy.model import Policy, load_policy
from learner.policy.step_batch import StepBatch
from learner.training import fsdp
from learner.training.rank import LearnerRank

ADAPTER = AdapterConfig(rank=4, alpha=8)
CHECK = ([[5, 9, 3, 8, 11, 40]], [2])
RATE = 1e-2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"), "qwen2")


def save(made: LearnerRank, target: Path) -> Path:
    made.take_checkpoint({"version": made.trainer.step})
    made.write_checkpoint(str(target))
    return target


def step(made: LearnerRank, number: int) -> dict[str, float]:
    return made.step(trajectories(SHAPES, seed=number), number, number)


def plain(path: Path, **changes: Any) -> tuple[list[float], dict[str, Tensor]]:
    """What a rank without adapters scores with a folder's weights, and what it publishes."""
    with worker(path, **changes) as made:
        return made.score(*CHECK)[0], weights(made)


def policy_of(path: Path) -> Policy:
    config = ModelConfig(path=str(path), dtype="float32")
    return load_policy(config, torch.float32, logits_mib=1, temperature=1.0, weights=True)[0]


# What is computed


@pytest.mark.parametrize("name", ["qwen2", "llama_untied", "gemma2", "gpt_neox", "granite"])
def test_merged_weights_compute_what_adapters_do(name: str, tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "base", name)
    with worker(tmp_path / "base", adapter=ADAPTER, learning_rate=RATE) as made:
        before = made.score(*CHECK)[0]
        for number in range(3):
            step(made, number)
        beside = made.score(*CHECK)[0]
        target = save(made, tmp_path / "step-3")
        sent = weights(made)
    merged, read = plain(target)
    assert np.abs(np.subtract(beside, before)).max() > 1e-2
    np.testing.assert_allclose(beside, merged, rtol=0, atol=2e-5)
    assert sent.keys() == read.keys()
    assert all(torch.equal(sent[name], read[name]) for name in sent)


def test_a_merged_layer_is_the_layer_with_its_adapter(folder: Path) -> None:
    """To 1e-6, where no other layer adds to the rounding."""
    policy = policy_of(folder)
    add_adapters(policy, ADAPTER, seed=0, weights=True)
    layers = list(adapted(policy))
    assert len(layers) == 2 * 7
    for _, layer in layers:
        torch.nn.init.normal_(pair_of(layer)[1], std=0.02)
        x = torch.randn(9, layer.in_features)
        whole = merge(layer.base_layer.weight, layer, pair_of(layer), torch.float32)
        expected = torch.nn.functional.linear(x, whole, layer.base_layer.bias)
        assert (layer(x) - expected).abs().max() <= 1e-6 * expected.abs().max()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_never_stepped_publishes_the_base_bit_for_bit(
    folder: Path, tmp_path: Path, dtype: str
) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():  # a sum would make a zero of each that has no sign
        model.model.layers[0].mlp.up_proj.weight[:3] = -0.0
    model.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    _, expected = plain(tmp_path, dtype=dtype)
    with worker(tmp_path, dtype=dtype, adapter=ADAPTER) as made:
        found = weights(made)
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name


def test_a_change_below_the_rounding_of_the_base_is_added_before_the_cast() -> None:
    """Added in bfloat16 it would be lost: 1 + 2^-9 twice is 1, and 1 + 2^-8 is not."""
    layer: Any = type("Layer", (), {"fan_in_fan_out": False, "scaling": {"default": 1.0}})()
    ones = torch.ones(1, 2)
    pair = ones, torch.full((1, 1), 2.0**-8)
    merged = merge(torch.full((1, 2), 1.0).bfloat16(), layer, pair, torch.float32)
    assert torch.equal(merged, ones + 2.0**-8)


# What is trained


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters_alone_are_trained_and_kept_in_float32(folder: Path, dtype: str) -> None:
    with worker(folder, dtype=dtype, adapter=ADAPTER, learning_rate=RATE) as made:
        model = made.trainer.policy.model
        frozen = {n: p.full_tensor() for n, p in model.named_parameters() if not p.requires_grad}
        step(made, 0)
        step(made, 1)
        after = dict(model.named_parameters())
        trained = {n: p for n, p in after.items() if p.requires_grad}
        assert len(trained) == 2 * 7 * 2
        assert all("lora_" in name and p.dtype == torch.float32 for name, p in trained.items())
        assert {p.dtype for n, p in after.items() if n not in trained} == {getattr(torch, dtype)}
        assert all(torch.equal(after[n].full_tensor(), tensor) for n, tensor in frozen.items())
        (optimizer,) = made.trainer.optimizers
        assert moments(made).keys() == trained.keys()
        states = [t for s in optimizer.state.values() for t in s.values()]
        assert {t.dtype for t in states} == {torch.float32}


def test_muon_has_all_adapters_to_itself(folder: Path) -> None:
    with worker(folder, adapter=ADAPTER, optimizer=OptimizerConfig(kind="Muon")) as made:
        (optimizer,) = made.trainer.optimizers
        assert type(optimizer).__name__ == "Muon"
        step(made, 0)
        step(made, 1)


def test_named_targets_alone_get_an_adapter(folder: Path) -> None:
    wanted = AdapterConfig(rank=2, targets="q_proj, 1.mlp.down_proj")
    policy = policy_of(folder)
    add_adapters(policy, wanted, seed=0, weights=True)
    assert [name.removeprefix("model.layers.") for name, _ in adapted(policy)] == [
        "0.self_attn.q_proj",
        "1.self_attn.q_proj",
        "1.mlp.down_proj",
    ]


class _TrainWork:
    def __call__(self, made: LearnerRank) -> Any:
        return train_work(made)


def _train_target(rank: int, ranks: int, folder: Path, dtype: str, kl: float) -> tuple:
    made = make_worker(folder, rank, ranks, adapter=ADAPTER, dtype=dtype, kl=kl)
    return made, _TrainWork()


def test_two_ranks_train_as_one(folder: Path) -> None:
    alone = train(folder, adapter=ADAPTER, kl=0.1)
    mine, theirs = on_ranks(2, _train_target, folder, "float32", 0.1)
    assert_same_training(mine, alone)
    assert untimed(mine[0][1]) == untimed(theirs[0][1])
    assert mine[0][1]["loss/kl"] == pytest.approx(alone[0][1]["loss/kl"], rel=1e-3)


# The model without its adapters


def test_the_reference_is_the_same_model_with_its_adapters_off(folder: Path) -> None:
    with worker(folder, kl=0.1, learning_rate=RATE, adapter=ADAPTER) as made:
        found = [step(made, number) for number in range(3)]
        reference = made.trainer.models.reference
        assert reference is not None
        assert reference.model is made.trainer.policy.model  # no second model
        for number in range(3, 5):  # gradients flow on, whoever was asked first
            found.append(step(made, number))
    assert found[0]["loss/kl"] == 0.0
    assert found[-1]["loss/kl"] > found[1]["loss/kl"] > 1e-5


def test_a_scorer_reads_with_adapters_off(folder: Path) -> None:
    algorithm = AlgorithmConfig()
    algorithm.advantage.kind, algorithm.advantage.scorer = "distill", "reference"
    with worker(folder, algorithm=algorithm, learning_rate=RATE, adapter=ADAPTER) as made:
        first = step(made, 0)
        for number in range(1, 4):
            step(made, number)
        again = made.trainer.probe  # the batch of the first step, under other adapters
        batch = StepBatch.from_record_batches(trajectories(SHAPES, seed=0))
        assert again(batch)["scorer/gap"] == first["scorer/gap"]


# Adapters that travel alone


class _SentWork:
    """Trains a step, then: what travels, and what it says of itself."""

    def __call__(self, made: LearnerRank) -> Any:
        step(made, 0)
        sent, adapters = weights(made), fsdp.full_adapters(made.trainer.policy)
        expected = {name: tensor.numpy() for name, tensor in adapters}
        shapes = {name: shape for name, dtype, shape in made._published().shapes()}
        return {name: tensor.numpy() for name, tensor in sent.items()}, shapes, expected


def _sent_target(rank: int, ranks: int, folder: Path) -> tuple:
    made = make_worker(folder, rank, ranks, adapter=ADAPTER, publish="adapter", dtype="bfloat16")
    return made, _SentWork()


def test_adapters_alone_are_sent_whole_and_in_float32_as_peft_calls_them(folder: Path) -> None:
    """Also by two ranks, of which each has half of every matrix, and where bfloat16 computes."""
    (sent, shapes, expected), (nothing, _, _) = on_ranks(2, _sent_target, folder)
    assert nothing == {}
    assert {name: values.shape for name, values in sent.items()} == shapes
    assert sent.keys() == expected.keys()
    assert all(np.array_equal(values, expected[name]) for name, values in sent.items())
    assert {values.dtype for values in sent.values()} == {np.dtype(np.float32)}
    first = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    assert sent[first].shape[0] == ADAPTER.rank
    assert len(sent) == 2 * 7 * 2


# Checkpoints


def resumed(folder: Path, target: Path, **changes: Any) -> tuple[dict[str, float], dict]:
    """Metrics and weights of step 2, after a resume from `target`."""
    with worker(target, reference=folder, learning_rate=RATE, **changes) as made:
        torch.manual_seed(99)
        assert made.load_checkpoint(str(target)) == {"version": 1}
        return step(made, 1), weights(made)


@pytest.mark.parametrize("aggregation", ["sequence_mean", "lambda_grpo"])
def test_a_resume_is_bitwise_the_unbroken_run(
    folder: Path, tmp_path: Path, aggregation: str
) -> None:
    """From the merged folder, as a run does it: the frozen weights are still the first ones.

    The preferences that `lambda_grpo` learns are kept beside the adapters.
    """
    algorithm = AlgorithmConfig()
    algorithm.objective.kl, algorithm.aggregation.kind = 0.1, aggregation
    keys = {"adapter": ADAPTER, "algorithm": algorithm}
    with worker(folder, learning_rate=RATE, **keys) as made:
        step(made, 0)
        target = save(made, tmp_path / "step-1")
        unbroken = step(made, 1), weights(made)
    found = resumed(folder, target, **keys)
    assert untimed(found[0]) == untimed(unbroken[0])
    assert all(torch.equal(found[1][name], tensor) for name, tensor in unbroken[1].items())


class _SaveWork:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __call__(self, made: LearnerRank) -> Any:
        step(made, 0)
        save(made, self.target)
        return step(made, 1)


def _save_target(rank: int, ranks: int, folder: Path, target: Path) -> tuple:
    made = make_worker(folder, rank, ranks, adapter=ADAPTER, learning_rate=RATE)
    return made, _SaveWork(target)


def test_one_rank_goes_on_from_what_two_have_written(tmp_path: Path) -> None:
    """Also where embedding and head are two, sharded apart and frozen."""
    base = save_tiny_model(tmp_path / "base", "llama_untied")
    unbroken = on_ranks(2, _save_target, base, tmp_path / "step-1")[0]
    found, _ = resumed(base, tmp_path / "step-1", adapter=ADAPTER)
    for name in ("loss/policy", "grad_norm", "is_ratio/mean"):
        assert found[name] == pytest.approx(unbroken[name], rel=1e-4, abs=1e-6), name


def test_a_run_killed_between_taking_and_writing_goes_on_from_the_one_before(
    folder: Path, tmp_path: Path
) -> None:
    with worker(folder, adapter=ADAPTER, learning_rate=RATE) as made:
        step(made, 0)
        target = save(made, tmp_path / "step-1")
        unbroken = step(made, 1), weights(made)
        made.take_checkpoint({"version": 2})
        # Killed here, as far as a file can tell.
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]
    found = resumed(folder, target, adapter=ADAPTER)
    assert untimed(found[0]) == untimed(unbroken[0])
    assert all(torch.equal(found[1][name], tensor) for name, tensor in unbroken[1].items())


def test_a_checkpoint_is_small_but_for_the_merged_model(folder: Path, tmp_path: Path) -> None:
    with worker(folder, adapter=ADAPTER, learning_rate=RATE) as made:
        step(made, 0)
        target = save(made, tmp_path / "step-1")
        adapters = sum(
            4 * p.numel() for p in made.trainer.policy.model.parameters() if p.requires_grad
        )
    state = FileSystemReader(target / "training_state").read_metadata().state_dict_metadata
    sizes = [4 * math.prod(entry.size) for entry in state.values() if hasattr(entry, "size")]
    assert 3 * adapters <= sum(sizes) <= 3 * adapters + 4 * len(sizes)  # and the counts of steps


def test_peft_reads_the_adapters_and_merges_them_alike(folder: Path, tmp_path: Path) -> None:
    with worker(folder, adapter=ADAPTER, learning_rate=RATE) as made:
        for number in range(3):
            step(made, number)
        target = save(made, tmp_path / "step-3")
    written = json.loads((target / "adapter" / "adapter_config.json").read_text())
    assert (written["r"], written["lora_alpha"], written["peft_type"]) == (4, 8, "LORA")
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(folder), target / "adapter"
    )
    theirs = model.merge_and_unload().state_dict()
    ours = load_file(target / "model.safetensors")
    assert len(ours) > 20
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-6, atol=1e-6)


def test_another_base_is_refused(folder: Path, tmp_path: Path) -> None:
    with worker(folder, adapter=ADAPTER) as made:
        target = save(made, tmp_path / "step-0")
    other = save_tiny_model(tmp_path / "other", "qwen2")
    model = AutoModelForCausalLM.from_pretrained(other)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 4] += 1e-3
    model.save_pretrained(other)
    for path, dtype in ((folder, "bfloat16"), (other, "float32")):
        with worker(path, adapter=ADAPTER, dtype=dtype) as made:
            if path == folder:  # computed in another type, it is the same base
                made.load_checkpoint(str(target))
                continue
            with pytest.raises(UserError, match="adapters to other weights than those of model"):
                made.load_checkpoint(str(target))


@pytest.mark.parametrize(
    ("written", "asked", "message"),
    [
        (ADAPTER, AdapterConfig(rank=8, alpha=8), "rank 4, alpha 8.*rank 8, alpha 8"),
        (ADAPTER, AdapterConfig(rank=4, alpha=16), "alpha 8.*alpha 16"),
        (ADAPTER, AdapterConfig(), "rank 4, alpha 8.*has all weights trained"),
        (AdapterConfig(), ADAPTER, "with all weights trained.*rank 4"),
    ],
)
def test_other_adapters_are_refused(
    written: AdapterConfig, asked: AdapterConfig, message: str, folder: Path, tmp_path: Path
) -> None:
    with worker(folder, adapter=written) as made:
        target = save(made, tmp_path / "step-0")
    with worker(folder, adapter=asked) as made, pytest.raises(UserError, match=message):
        made.load_checkpoint(str(target))


# Layers that take none


def refusal(path: Path, targets: str) -> str:
    policy = policy_of(path)
    with pytest.raises(UserError) as raised:
        add_adapters(policy, AdapterConfig(rank=2, targets=targets), seed=0, weights=True)
    return str(raised.value)


@pytest.mark.parametrize(
    ("name", "targets", "message"),
    [
        ("llama_tied", "q_proj,lm_head", "lm_head is the output head, and tied"),
        ("llama_untied", "lm_head", "lm_head is the output head. It stays frozen"),
        ("llama_tied", "embed_tokens", "embed_tokens is the embedding, and tied"),
        ("llama_tied", "q_prj", "q_prj is no linear layer of this model (did you mean q_proj?)"),
        ("llama_tied", "input_layernorm", "no linear layer"),
    ],
)
def test_a_target_that_takes_no_adapter_is_refused(
    name: str, targets: str, message: str, tmp_path: Path
) -> None:
    assert message in refusal(save_tiny_model(tmp_path, name), targets)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "glm4_moe"])
def test_experts_are_refused_and_other_layers_of_the_model_are_not(
    name: str, tmp_path: Path
) -> None:
    save_model(tmp_path, name)
    assert "the experts of this model are one tensor a layer" in refusal(tmp_path, "all-linear")
    wanted = AdapterConfig(rank=2, targets="q_proj,o_proj")
    saved = load_file(tmp_path / "model.safetensors")
    with worker(tmp_path, adapter=wanted, learning_rate=RATE) as made:
        step(made, 0)
        step(made, 1)
        found = weights(made)
    assert found.keys() == saved.keys()  # the checkpoint's own names, also of experts
    moved = {key.split(".")[-2] for key in saved if not torch.equal(found[key], saved[key])}
    assert moved == {"q_proj", "o_proj"}


def gpt2(path: Path) -> Path:
    """A model whose layers hold their weights the other way round."""
    config = GPT2Config(
        vocab_size=97, n_positions=256, n_embd=64, n_layer=2, n_head=4, initializer_range=0.2
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    (path / "tokenizer.json").write_text("{}")
    return path


def test_weights_that_stand_the_other_way_round_are_merged_so(tmp_path: Path) -> None:
    gpt2(tmp_path / "base")
    with worker(tmp_path / "base", adapter=ADAPTER, learning_rate=RATE) as made:
        before = made.score(*CHECK)[0]
        for number in range(3):
            step(made, number)
        beside = made.score(*CHECK)[0]
        target = save(made, tmp_path / "step-3")
    assert np.abs(np.subtract(beside, before)).max() > 1e-2
    np.testing.assert_allclose(beside, plain(target)[0], rtol=0, atol=2e-5)


def test_a_layer_whose_weight_is_read_past_it_is_refused(folder: Path) -> None:
    """Such an adapter would never be trained, and nothing would say so."""
    policy = policy_of(folder)
    for layer in policy.layers:
        mlp = layer.mlp

        def forward(x: Tensor, mlp: Any = mlp) -> Tensor:
            gate = torch.nn.functional.linear(x, mlp.gate_proj.weight)
            return mlp.down_proj(mlp.act_fn(gate) * mlp.up_proj(x))

        mlp.forward = forward
    with pytest.raises(UserError, match="computes otherwise than with merged weights"):
        add_adapters(policy, ADAPTER, seed=0, weights=True)
    others = AdapterConfig(rank=4, alpha=8, targets="q_proj,up_proj,down_proj")
    again = policy_of(folder)
    add_adapters(again, others, seed=0, weights=True)
