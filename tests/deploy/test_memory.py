"""The memory estimate: counts what is in the files, and refuses what cannot fit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from learner_models import save_tiny_model, tiny_config
from learner_ranks import worker
from run_process import run_python
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from common.config.load import load_config
from common.config.sections import AdapterConfig
from common.errors import UserError
from deploy.placement import memory
from deploy.placement.options import cpu_multiplies_bfloat16
from learner.policy.shape import shape_of_config
from learner.training.memory import ALONE, LearnerLoad, OtherModels, learner_memory


def test_parameters_are_counted_from_the_headers(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(3, 5), "b": torch.zeros(())}, tmp_path / "one.safetensors")
    save_file({"c": torch.zeros(7, dtype=torch.bfloat16)}, tmp_path / "two.safetensors")
    assert memory.count_parameters(tmp_path) == 3 * 5 + 1 + 7


def test_the_estimate_grows_with_what_it_is_made_of() -> None:
    def total(*overrides: str, has_reference: bool = False) -> float:
        config = load_config([], ["model.path=x", "model.dtype=bfloat16", *overrides])
        return memory.estimate(config, 10**9, OtherModels(reference=has_reference)).total

    base = total()
    assert total("generator.kv_cache_gib=3") - base == pytest.approx(2 * memory.GIB)
    assert total("generator.count=2") > base + 2 * 10**9
    assert total(has_reference=True) - base == pytest.approx(2 * 10**9)
    assert total("model.dtype=float32") > base
    # AdamW's two moments, one of momentum and none, in the learner and in a checkpoint's copy.
    momentum = ("learner.optimizer.kind=SGD", "learner.optimizer.args={momentum: 0.9}")
    assert base - total(*momentum) == pytest.approx(2 * 4 * 10**9)
    assert base - total("learner.optimizer.kind=SGD") == pytest.approx(2 * 8 * 10**9)
    # Two bytes of each moment's eight, and a scale for each 256; two of a weight's four.
    eight = total("learner.optimizer.state=8bit")
    assert base - eight == pytest.approx(2 * (8 - 2 * (1 + 4 / 256)) * 10**9, rel=0.01)
    assert base - total("learner.masters=bfloat16") == pytest.approx(2 * 2 * 10**9)


def test_quantised_matrices_take_a_byte_in_every_generator_and_nowhere_else(tmp_path: Path) -> None:
    save_tiny_model(tmp_path, "qwen2")
    shape = shape_of_config(tiny_config("qwen2").to_dict())
    matrices = shape.layers * sum(inputs * outputs for inputs, outputs in shape.linear.values())
    assert memory.count_quantised(tmp_path) == matrices > 0
    config = load_config([], ["model.path=x", "model.dtype=bfloat16", "generator.count=2"])
    plain, eight = (memory.estimate(config, 10**9, quantised=n) for n in (0, 10**8))
    assert plain.generators - eight.generators == pytest.approx(2 * 10**8)
    assert plain.total - eight.total == pytest.approx(2 * 10**8)
    # The plan of devices: a byte less each, and a float32 scale for every output.
    outputs = shape.layers * sum(outputs for _, outputs in shape.linear.values())
    assert shape.sampler_bytes(None) == 2 * shape.parameters
    assert shape.sampler_bytes("fp8") == 2 * shape.parameters - matrices + 4 * outputs


def test_experts_are_not_counted_as_quantised(tmp_path: Path) -> None:
    tensors = {
        "model.layers.0.mlp.experts.0.up_proj.weight": torch.zeros(4, 4),
        "model.layers.0.self_attn.q_proj.weight": torch.zeros(4, 2),
        "model.embed_tokens.weight": torch.zeros(9, 4),
        "model.layers.0.norm.weight": torch.zeros(4),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    assert memory.count_quantised(tmp_path) == 8


def test_a_run_that_cannot_fit_is_refused_with_the_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file({"a": torch.zeros(1000, 1000)}, tmp_path / "model.safetensors")
    config = load_config([], [f"model.path={tmp_path}"])
    monkeypatch.setattr(memory, "available_bytes", lambda: 2 * memory.GIB)
    with pytest.raises(UserError, match=r"(?s)needs about .* 2\.0 GiB are.*kv_cache_gib"):
        memory.check_memory(config, tmp_path, ALONE)
    monkeypatch.setattr(memory, "available_bytes", lambda: 64 * memory.GIB)
    memory.check_memory(config, tmp_path, ALONE)


def trained(folder: Path, adapter: AdapterConfig) -> int:
    """Parameters that a learner rank trains."""
    with worker(folder, adapter=adapter) as made:
        return sum(p.numel() for p in made.trainer.policy.model.parameters() if p.requires_grad)


@pytest.mark.parametrize("targets", ["all-linear", "q_proj,down_proj"])
def test_adapters_are_counted_as_the_learner_makes_them(tmp_path: Path, targets: str) -> None:
    save_tiny_model(tmp_path, "qwen2")
    adapter = AdapterConfig(rank=4, targets=targets)
    shape = shape_of_config(tiny_config("qwen2").to_dict())
    count = trained(tmp_path, adapter)
    assert memory.count_adapters(tmp_path, adapter) == count > 0
    assert shape.adapter_parameters(4, targets) == count


def test_a_plan_counts_only_layers_that_it_knows(tmp_path: Path) -> None:
    shape = shape_of_config(tiny_config("qwen2").to_dict())
    with pytest.raises(UserError, match=r"cannot count q_prj \(did you mean q_proj"):
        shape.adapter_parameters(4, "q_prj")


def test_adapters_take_sixteen_bytes_a_parameter_and_the_rest_two() -> None:
    config = load_config([], ["model.path=x", "model.dtype=bfloat16", "model.adapter.rank=8"])
    full = memory.estimate(config, 10**9)
    small = memory.estimate(config, 10**9, adapters=10**7)
    again = memory.estimate(config, 10**9, OtherModels(reference=True), adapters=10**7)
    assert full.learner - small.learner == pytest.approx(16e9 - 16e7 - 2e9)
    assert full.checkpoint - small.checkpoint == pytest.approx(12e9 - 12e7)
    assert again == small  # the reference is the same model with its adapters off


def test_an_average_of_adapters_is_as_small_and_a_critic_has_frozen_weights_of_its_own() -> None:
    config = load_config([], ["model.path=x", "model.dtype=bfloat16", "model.adapter.rank=8"])

    def more(**others: bool) -> float:
        alone = memory.estimate(config, 10**9, adapters=10**7).learner
        return memory.estimate(config, 10**9, OtherModels(**others), adapters=10**7).learner - alone

    assert more(average=True) == pytest.approx(4 * 10**7)
    # Gathered as well; gradients are of one model at a time.
    assert more(critic=True) == pytest.approx(2 * 2 * 10**9 + 12 * 10**7)
    shape = shape_of_config(tiny_config("qwen2").to_dict())
    load = LearnerLoad(shards=2, tokens=36, logits_mib=1, recompute=False, adapters=1000)
    alone = learner_memory(shape, load).kept

    def kept(**others: bool) -> float:
        return learner_memory(shape, replace(load, others=OtherModels(**others))).kept - alone

    assert kept(average=True) == pytest.approx(4 * 1000 / 2)
    assert kept(critic=True) == pytest.approx((12 * 1000 + 2 * shape.parameters) / 2)


def test_what_is_planned_for_adapters_is_what_a_process_takes(tmp_path: Path) -> None:
    """Memory that a rank asks for at its peak, against the plan: within a tenth.

    Where a processor has no bfloat16, torch widens the matrices of a product first: a tenth more,
    which the plan does not count. Nor does it count holes between used pieces of the heap.
    """
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=768,
        intermediate_size=2304,
        num_hidden_layers=16,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    run = load_config([], ["model.path=x", "model.dtype=bfloat16", "model.adapter.rank=8"])
    adapters = memory.count_adapters(tmp_path, run.model.adapter)
    parameters = memory.count_parameters(tmp_path)
    kept = memory.estimate(run, parameters, adapters=adapters).learner
    load = LearnerLoad(shards=1, tokens=36, logits_mib=1, recompute=False, adapters=adapters)
    step = learner_memory(shape_of_config(config.to_dict()), load)
    planned = kept - memory.PROCESS_BYTES["learner"] + step.activations + step.head
    script = Path(__file__).parents[1] / "support" / "learner_peak.py"
    taken = json.loads(run_python(str(script), str(tmp_path), "8", timeout_s=280).stdout)
    widened = 0.0 if cpu_multiplies_bfloat16() else 0.1
    assert taken["allocated"] == pytest.approx(planned, rel=0.1 + widened)
    assert taken["private"] == pytest.approx(planned, rel=0.2 + widened)
    assert taken["private"] < 0.3 * memory.estimate(run, parameters).learner
