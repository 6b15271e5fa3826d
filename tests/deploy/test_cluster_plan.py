"""Plans for GPUs: shapes are those of the models, what does not fit is said, presets fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from common.config.load import load_config
from common.config.sections import Config
from common.errors import UserError
from deploy.cli import main
from deploy.command.presets import CONFIGS
from deploy.predict import costs
from deploy.predict.cluster_plan import ClusterPlan
from deploy.predict.costs import DEVICES, MODELS, Pools, costs_on, model_shape

PRESETS = sorted(path.name for path in CONFIGS.glob("*x8.yaml"))


def config(*overrides: str, preset: str = "qwen2.5-7b-2x8.yaml") -> Config:
    return load_config([CONFIGS / preset], overrides, CONFIGS / "recipes")


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("Qwen/Qwen2.5-1.5B", 1_543_714_304),
        ("Qwen/Qwen2.5-3B", 3_085_938_688),
        ("Qwen/Qwen2.5-7B", 7_615_616_512),
        ("meta-llama/Llama-3.1-8B", 8_030_261_248),
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
    lost = plans[0].generator_memory.cache - plans[1].generator_memory.cache
    assert lost == plans[1].learner_memory.optimiser
    assert "in turns on the same devices" in "\n".join(plans[1].lines())
    assert plans[1].splits() == []


def test_copies_of_the_learner_take_more_memory_each() -> None:
    keys = ("generator.count=8", "learner.ranks=8")
    one, two = (ClusterPlan.of(config(*keys, *k)) for k in ((), ("learner.shard_ranks=4",)))
    assert two.learner_memory.optimiser == 2 * one.learner_memory.optimiser


def test_the_optimiser_is_counted() -> None:
    """16 bytes a parameter with AdamW's moments, 8 of them without; a step writes less as well."""
    keys = ("generator.count=8", "learner.ranks=8")
    adamw, sgd = (ClusterPlan.of(config(*keys, *k)) for k in ((), ("learner.optimizer.kind=SGD",)))
    assert adamw.learner_memory.optimiser == 16 * adamw.model.parameters / 8
    assert sgd.learner_memory.optimiser == 8 * adamw.model.parameters / 8
    assert sgd.costs().learner_step_s < adamw.costs().learner_step_s


def test_costs_scale_as_their_causes() -> None:
    device, model = DEVICES["H100-80GB"], MODELS["Qwen/Qwen2.5-7B"]

    def at(parallel: int = 1, ranks: int = 4, context: float = 1000.0) -> costs.Costs:
        return costs_on(device, model, Pools(4, parallel, ranks), context, recompute=True)

    assert at(ranks=8).learner_token_s == pytest.approx(at().learner_token_s / 2)
    assert at(parallel=2).prefill_token_s == pytest.approx(at().prefill_token_s / 2)
    assert at(context=0.0).decode_sequence_s < at().decode_sequence_s
    plain = costs_on(device, model, Pools(4, 1, 4), 1000.0, recompute=False)
    assert at().learner_token_s == pytest.approx(plain.learner_token_s * 4 / 3)
    # 6 N FLOP a token at the assumed share of the peak.
    assert plain.learner_token_s == pytest.approx(6 * model.parameters / (4 * 0.4 * 989e12))


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_fits_and_is_planned(preset: str) -> None:
    plan = ClusterPlan.of(config(preset=preset))
    assert plan.problems == []
    nodes = int(preset.rsplit("-", maxsplit=1)[-1].split("x", maxsplit=1)[0])
    assert plan.pools.devices == 8 * nodes
    if nodes > 2:  # the same proportions, and ten seconds each
        return
    # A preset is within a tenth of the best split that the simulation finds.
    assert plan.predict().step_s <= 1.1 * plan.splits()[0][1].step_s


def test_there_are_presets_of_every_size() -> None:
    stems = {preset.rsplit("-", 1)[0] for preset in PRESETS}
    assert stems == {"qwen2.5-1.5b", "qwen2.5-3b", "qwen2.5-7b", "llama-3.1-8b"}
    assert len(PRESETS) == 12


def test_what_does_not_fit_is_refused_with_a_remedy(capsys: pytest.CaptureFixture[str]) -> None:
    preset = str(CONFIGS / "qwen2.5-7b-2x8.yaml")
    assert main(["plan", "--config", preset, "learner.ranks=1"]) == 2
    assert "more learner.ranks" in capsys.readouterr().err
    assert main(["plan", "--config", preset, "placement.generator_device=L40S-48GB"]) == 0
    small = ["placement.generator_device=L40S-48GB", "generator.memory_fraction=0.3"]
    assert main(["plan", "--config", preset, *small]) == 2
    assert "a larger generator.tensor_parallel" in capsys.readouterr().err
    assert main(["plan", "--config", preset, "placement.generator_device=B9000"]) == 2
    assert "known are A100-80GB" in capsys.readouterr().err


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
