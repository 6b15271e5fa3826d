"""Plans for GPUs: shapes are those of the models, what does not fit is said, presets fit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from common.config.load import load_config
from common.config.sections import Config
from common.devices import DEVICES
from common.errors import UserError
from deploy.cli import main
from deploy.command.presets import CONFIGS
from deploy.predict import costs
from deploy.predict.cluster_plan import ClusterPlan
from deploy.predict.costs import Pass, Pools, costs_on, learner_pass, publish_times
from deploy.predict.models import MODELS, model_shape
from learner.training.memory import LearnerLoad, learner_memory

PRESETS = sorted(
    p.name
    for p in CONFIGS.glob("*.yaml")
    if p.stem not in ("tiny", "tiny-guess", "smollm2", "smollm2-calculator")
)


def config(*overrides: str, preset: str = "qwen2.5-7b-2x8.yaml") -> Config:
    return load_config([CONFIGS / preset], overrides, CONFIGS / "recipes")


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("Qwen/Qwen2.5-1.5B", 1_543_714_304),
        ("Qwen/Qwen2.5-3B", 3_085_938_688),
        ("Qwen/Qwen2.5-7B", 7_615_616_512),
        ("meta-llama/Llama-3.1-8B", 8_030_261_248),
        ("meta-llama/Llama-3.2-1B", 1_235_814_400),
        ("Qwen/Qwen3-4B", 4_022_468_096),
        ("Qwen/Qwen3-8B", 8_190_735_360),
        ("HuggingFaceTB/SmolLM3-3B", 3_075_098_624),
    ],
)
def test_parameters_are_those_of_the_published_models(name: str, parameters: int) -> None:
    assert MODELS[name].parameters == parameters
    assert model_shape(f"{name}-Instruct") == MODELS[name]


def test_a_shape_is_read_from_a_folder(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM, Qwen2Config

    made = Qwen2Config(
        vocab_size=97,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        tie_word_embeddings=True,
    )
    made.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    shape = model_shape(str(tmp_path))
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert shape.kv_bytes == 2 * 3 * 2 * 8 * 2
    with pytest.raises(UserError, match="its shape is not known"):
        model_shape("somebody/some-model")


def test_devices_that_are_shared_count_once_and_keep_the_optimiser() -> None:
    pools = ("generator.count=8", "learner.ranks=8", "generator.tensor_parallel=1")
    together = ("weights.transport=ipc", "generator.max_staleness=0")
    plans = [ClusterPlan.of(config(*pools, *more)) for more in ((), together)]
    assert [plan.pools.devices for plan in plans] == [16, 8]
    apart, turns = (plan.memory for plan in plans)
    turns_config = plans[1].config
    assert turns.kv_cache_bytes < apart.kv_cache_bytes
    # What both keep, the cache of vLLM and its forward pass are within the share of the device.
    taken = turns.generator_contexts + turns.learner.kept + turns.generator.weights
    taken += turns.generator.activations + turns.generator.cache
    assert taken <= turns_config.generator.memory_fraction * turns.generator_device
    assert "in turns on the same devices" in "\n".join(plans[1].lines())
    assert plans[1].splits() == []


def test_copies_of_the_learner_take_more_memory_each() -> None:
    keys = ("generator.count=8", "learner.ranks=8")
    one, two = (ClusterPlan.of(config(*keys, *k)) for k in ((), ("learner.shard_ranks=4",)))
    assert two.memory.learner.kept == 2 * one.memory.learner.kept


def test_the_optimiser_is_counted() -> None:
    """12 bytes a parameter with AdamW's moments, 4 without; a step writes less as well."""
    keys = ("generator.count=8", "learner.ranks=8")
    adamw, sgd = (ClusterPlan.of(config(*keys, *k)) for k in ((), ("learner.optimizer.kind=SGD",)))
    assert adamw.memory.learner.kept == 12 * adamw.model.parameters / 8
    assert sgd.memory.learner.kept == 4 * adamw.model.parameters / 8
    assert sgd.costs().learner_step_s < adamw.costs().learner_step_s


def test_costs_scale_as_their_causes() -> None:
    device, model = DEVICES["H100-80GB"], MODELS["Qwen/Qwen2.5-7B"]
    load = LearnerLoad(shards=4, tokens=16_384, logits_mib=1024, recompute=True)

    def at(parallel: int = 1, ranks: int = 4, context: float = 1000.0) -> costs.Costs:
        work = learner_pass(device, model, load, context, per_node=8)
        publish = publish_times(model, device, "nccl", one_node=True)
        pools = Pools(4, parallel, ranks)
        return costs_on(device, model, pools, context, learner=work, publish=publish)

    assert at(ranks=8).learner_token_s == pytest.approx(at().learner_token_s / 2)
    assert at(parallel=2).prefill_token_s == pytest.approx(at().prefill_token_s / 2)
    assert at(context=0.0).decode_sequence_s < at().decode_sequence_s


def test_a_micro_batch_is_its_products_and_what_no_work_hides() -> None:
    device, model = DEVICES["H100-80GB"], MODELS["Qwen/Qwen2.5-7B"]

    def work(
        shards: int = 8, per_node: int = 8, recompute: bool = True, once: bool = False
    ) -> Pass:
        load = LearnerLoad(shards, 16_384, 1024, recompute, once)
        return learner_pass(device, model, load, 1000.0, per_node)

    inside = 2 * model.layers * model.layer_parameters * 16_384
    saved = work().products - work(recompute=False).products
    assert saved == pytest.approx(inside / (0.5 * device.flops))
    assert work().exposed == 0
    assert work(shards=1).messages == 0
    # Over the network a model of 7B is gathered in 1.5 s, inside of a node in a tenth of that.
    assert work(shards=64).messages > 8 * work().messages
    assert work(once=True).messages == pytest.approx(work().messages / 2)
    slow = learner_pass(
        DEVICES["L40S-48GB"], model, LearnerLoad(8, 1024, 1024, True), 1000.0, per_node=8
    )
    assert slow.exposed == pytest.approx(
        slow.seconds - slow.products - slow.attention - slow.vectors
    )
    assert slow.exposed > 0
    assert 0.3 < work().mfu < 0.45


def test_weights_travel_as_their_transport_carries_them() -> None:
    device, model = DEVICES["H100-80GB"], MODELS["Qwen/Qwen2.5-7B"]
    travel = {
        name: publish_times(model, device, name, one_node=False).travel
        for name in ("ipc", "nccl", "object_store")
    }
    assert travel["ipc"] < travel["nccl"] < travel["object_store"]
    # vLLM's reload goes through every layer in Python.
    assert publish_times(model, device, "nccl", one_node=True).load > 0.5


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_fits_and_its_step_fits_the_grace(preset: str) -> None:
    asked = config(preset=preset)
    plan = ClusterPlan.of(asked)
    assert plan.problems == []
    devices = preset.removesuffix(".yaml").rsplit("-", maxsplit=1)[-1]
    nodes, _, each = devices.rpartition("x")
    expected = int(nodes or 1) * (8 if each == "8" else 1)
    assert plan.pools.devices == expected
    if expected > 16:  # the same proportions, and ten seconds each
        assert asked.learner.shard_ranks == 8
        return
    step_s = plan.predict(steps=12).step_s
    assert asked.checkpoint.stop_grace_s > 1.2 * step_s
    if plan.pools.devices <= 8 and not plan.pools.shared:
        # A preset is within a seventh of the best split that the simulation finds.
        assert step_s <= 1.15 * plan.splits()[0][1].step_s


def test_there_are_presets_of_every_size() -> None:
    kinds = {preset.removesuffix(".yaml").rsplit("-", 1)[1] for preset in PRESETS}
    assert kinds == {"16gb", "24gb", "80gb", "2x80gb", "4x80gb", "1x8", "2x8", "8x8"}
    families = {preset.split("-", maxsplit=1)[0] for preset in PRESETS}
    assert families == {"qwen2.5", "qwen3", "llama", "smollm3"}


def test_what_does_not_fit_is_refused_with_a_remedy(capsys: pytest.CaptureFixture[str]) -> None:
    preset = str(CONFIGS / "qwen2.5-7b-2x8.yaml")
    assert main(["plan", "--config", preset, "learner.ranks=1"]) == 2
    assert "more learner.ranks" in capsys.readouterr().err
    assert main(["plan", "--config", preset, "placement.generator_device=L40S-48GB"]) == 0
    small = ["placement.generator_device=L40S-48GB", "generator.memory_fraction=0.3"]
    assert main(["plan", "--config", preset, *small]) == 2
    assert "a larger generator.tensor_parallel" in capsys.readouterr().err
    assert main(["plan", "--config", preset, "placement.generator_device=B9000"]) == 2
    assert "known are A10-24GB" in capsys.readouterr().err


def test_a_plan_says_what_a_step_would_take(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    preset = str(CONFIGS / "qwen2.5-7b-2x8.yaml")
    assert main(["plan", "--config", preset]) == 0
    output = capsys.readouterr().out
    for part in ("# Pools", "# Memory a device", "# Predicted step", "# Best splits of 16 devices"):
        assert part in output
    assert "bottleneck" in output
    measured = tmp_path / "costs.json"
    numbers = dict.fromkeys(costs.Costs.__dataclass_fields__, 1e-9) | {"learner_step_s": 7.0}
    measured.write_text(json.dumps(numbers))
    assert main(["plan", "--config", preset, "--costs", str(measured)]) == 0
    output = capsys.readouterr().out
    assert "step          7.00 s" in output
    assert "bottleneck    learning" in output
    measured.write_text("{}")
    assert main(["plan", "--config", preset, "--costs", str(measured)]) == 2
    assert "decode_round_s" in capsys.readouterr().err
    for wrong in (-1.0, float("nan")):
        measured.write_text(json.dumps(numbers | {"verify_s": wrong}))
        assert main(["plan", "--config", preset, "--costs", str(measured)]) == 2
        assert f"verify_s={wrong} must be at least 0" in capsys.readouterr().err


def test_a_multimodal_model_s_shape_is_that_of_its_language_model(tmp_path: Path) -> None:
    text = {
        "vocab_size": 1000,
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "intermediate_size": 128,
    }
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "both", "text_config": text}))
    shape = model_shape(str(tmp_path))
    assert (shape.layers, shape.kv_heads, shape.head_size) == (3, 2, 8)


@pytest.mark.parametrize("option", ["--lengths", "--costs"])
def test_options_of_the_simulation_are_refused_where_there_is_none(
    option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = str(CONFIGS / "tiny.yaml")
    assert main(["plan", "--config", tiny, option, "nowhere"]) != 0
    assert "placement.generator_device=" in capsys.readouterr().err


def test_with_adapters_a_model_fits_a_device_that_all_of_its_weights_do_not() -> None:
    keys = ["model.path=Qwen/Qwen2.5-7B-Instruct", "batch.tokens_per_microbatch=8192"]
    full = ClusterPlan.of(config(*keys, preset="qwen2.5-1.5b-80gb.yaml"))
    assert any("a learner rank needs" in problem for problem in full.problems)
    keys = [*keys, "model.adapter.rank=16"]
    small = ClusterPlan.of(config(*keys, preset="qwen2.5-1.5b-80gb.yaml"))
    assert small.problems == []
    assert small.memory.learner.kept < 0.18 * full.memory.learner.kept
    assert small.learner_pass.products < 0.8 * full.learner_pass.products
    assert any("40.37 of 7656.0 million" in line for line in small.memory_lines())
    # The base is the reference too.
    asked = config(*keys, "algorithm.objective.kl=0.1", preset="qwen2.5-1.5b-80gb.yaml")
    assert ClusterPlan.of(asked).memory.learner == small.memory.learner


LEAN = ["learner.optimizer.state=8bit", "learner.masters=bfloat16"]


def test_all_weights_of_a_small_model_fit_a_small_device_in_less_memory() -> None:
    preset = "qwen2.5-1.5b-24gb.yaml"
    lean = ClusterPlan.of(config(preset=preset))
    full = ["learner.optimizer.state=float32", "learner.masters=float32"]
    usual = ClusterPlan.of(config(*full, preset=preset))
    assert lean.problems == []
    assert any("learner.optimizer.state=8bit" in problem for problem in usual.problems)
    weights = MODELS["Qwen/Qwen2.5-1.5B"].parameters
    assert usual.memory.learner.kept == 12 * weights
    assert lean.memory.learner.kept == pytest.approx((2 + 2 * (1 + 4 / 256)) * weights, rel=0.01)
    assert (usual.memory.learner.gradients, lean.memory.learner.gradients) == (
        4 * weights,
        2 * weights,
    )
    assert any("trained 2 bytes, not 4; optimiser states 2.0" in x for x in lean.memory_lines())
    assert not any("saving" in line for line in usual.memory_lines())
    assert lean.costs().learner_step_s < usual.costs().learner_step_s


def test_gradients_that_are_exchanged_once_are_float32_whatever_the_weights_are() -> None:
    keys = [*LEAN, "learner.reduce_once=true"]
    plan = ClusterPlan.of(config(*keys, preset="qwen2.5-1.5b-80gb.yaml"))
    assert plan.memory.learner.gradients == 4 * plan.model.parameters


def test_activations_on_the_host_are_planned_there_and_their_way_takes_time() -> None:
    preset, key = "qwen2.5-7b-4x80gb.yaml", "learner.activation_offload=true"
    here, there = (ClusterPlan.of(config(*keys, preset=preset)) for keys in ([], [key]))
    load, shape = there.memory.load, there.model
    assert load.recompute
    assert there.memory.learner.host == 2 * load.tokens * shape.hidden * shape.layers
    again = replace(here.memory.load, recompute=True)
    gone = learner_memory(shape, again).activations - there.memory.learner.activations
    rows = gone / (2 * load.tokens * shape.hidden)
    assert shape.layers - 1 <= rows <= shape.layers
    assert there.learner_pass.copies > 0 == here.learner_pass.copies
    text = "\n".join(there.lines())
    assert "from inputs that wait on the host" in text
    assert "copies to the host and back" in text
