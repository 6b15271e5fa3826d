"""One device or more: who stands where, and in which order the parts take their memory."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from common.config.checks import check_config
from common.config.load import load_config
from common.config.sections import Config
from common.errors import UserError
from common.supervision.calls import Handle
from common.supervision.waits import Waits
from deploy.cli import main
from deploy.command.presets import CONFIGS, load
from deploy.placement.devices import check_savings, on_these_devices
from deploy.run import lifetime
from deploy.run.actors import Actors
from deploy.run.assembly import Assembly
from deploy.run.service import _check
from deploy.run.shared_devices import plan_on
from deploy.run.start_times import StartTimes
from learner.training.memory import OtherModels

PRESETS = sorted(CONFIGS.glob("*.yaml"))
GIB = 2**30
SHAPE = {
    "vocab_size": 151_936,
    "hidden_size": 1536,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "intermediate_size": 8960,
    "tie_word_embeddings": True,
    "model_type": "qwen2",
}


def machine(devices: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: devices > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_every_preset_takes_turns_on_one_device(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever nodes it was written for, on a machine alone it is what fits there."""
    machine(1, monkeypatch)
    config, said = on_these_devices(load(path, ["ray.address=local"]))
    assert config.transport.name == "ipc"
    assert config.generator.max_staleness == 0
    assert config.correction_kind == "none"
    check_config(config)
    assert _check(config, OtherModels())
    asked = load(path, ["ray.address=local"])
    if said is None:  # it was written for one
        assert config == asked
        assert asked.generator.count == asked.learner.ranks == 1
        return
    assert "one CUDA device here" in said
    assert ("weights.transport=ipc for " in said) == (asked.transport.name != "ipc")


def test_what_was_changed_is_said_key_by_key(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(1, monkeypatch)
    asked = ["model.path=x", "generator.count=3", "learner.ranks=2"]
    _, said = on_these_devices(load_config([], asked))
    assert said is not None
    assert "generator.count=1 for 3" in said
    assert "learner.ranks=1 for 2" in said
    assert "generator.max_staleness=0 for 1" in said
    assert "tensor_parallel" not in said


@pytest.mark.parametrize(
    ("devices", "overrides"),
    [
        (2, []),
        (8, ["generator.count=3"]),
        (0, []),
        (1, ["learner.device=cpu"]),
        (1, ["ray.address=auto"]),
        (1, ["weights.transport=ipc", "generator.max_staleness=0"]),
    ],
)
def test_elsewhere_a_configuration_stays_as_it_is(
    devices: int, overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(devices, monkeypatch)
    config = load_config([], ["model.path=x", *overrides])
    assert on_these_devices(config) == (config, None)


OFFLOAD, NARROW = "learner.activation_offload=true", "learner.masters=bfloat16"


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ([OFFLOAD], "on CPUs, where they are in the host's memory anyway"),
        ([NARROW], "narrower than what this CPU computes in"),
        ([NARROW, "model.dtype=bfloat16"], None),
        ([OFFLOAD, NARROW, "placement.generator_device=L40S-48GB"], None),
    ],
)
def test_savings_that_this_machine_cannot_make_are_refused(
    keys: list[str], words: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deploy.placement.options.cpu_multiplies_bfloat16", lambda: False)
    config = load_config([], ["model.path=x", *keys])
    machine(0, monkeypatch)
    if words is None:
        check_savings(config)
    else:
        with pytest.raises(UserError, match=words):
            check_savings(config)
    machine(1, monkeypatch)
    check_savings(config)


def test_a_run_and_a_plan_say_what_they_chose(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is written down is what runs: a replay takes the correction from there."""
    machine(1, monkeypatch)
    created: list[Config] = []

    def create(config: Config) -> None:
        created.append(config)
        raise UserError("far enough")

    monkeypatch.setattr(lifetime.RunDirectory, "create", create)
    config = load(CONFIGS / "smollm2.yaml", [f"runs_dir={tmp_path}"])
    service: Any = None
    with pytest.raises(UserError, match="far enough"):
        asyncio.run(lifetime.train_to_end(config, service, service, last=True))
    assert created[0].weights.transport == "ipc"
    assert created[0].generator.max_staleness == 0
    assert "one CUDA device here" in capsys.readouterr().out
    assert main(["plan", "--config", str(CONFIGS / "smollm2.yaml")]) == 0
    assert "one CUDA device here" in capsys.readouterr().out


class Actor:
    """An actor that takes down its calls in a list that all of a test share."""

    def __init__(self, calls: list[str], name: str, **answers: Any) -> None:
        self._calls, self._name, self._answers = calls, name, answers

    def __getattr__(self, method: str) -> Any:
        async def answer(*args: Any) -> Any:
            self._calls.append(" ".join([self._name, method, *map(str, args)]))
            await asyncio.sleep(0)
            return self._answers.get(method)

        return SimpleNamespace(remote=answer)


class Learner:
    def __init__(self, calls: list[str]) -> None:
        self._calls = calls

    async def setup(self, deadline_s: float) -> dict[str, Any]:
        self._calls.append("learner setup")
        return {"reach": 7, "notes": []}


def model_folder(tmp_path: Path, **changes: Any) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(SHAPE | changes))
    return tmp_path


def start(folder: Path, device_gib: float, *overrides: str, used: bool = False) -> list[str]:
    """The calls with which the members of a run come up."""
    calls: list[str] = []
    size = int(device_gib * GIB)
    generator = Actor(calls, "generator", device_bytes=size)
    actors = Actors({"generator-0": Handle(generator)}, {"v": Handle(Actor(calls, "v"))}, [])
    config = load_config([], [f"model.path={folder}", "model.dtype=bfloat16", *overrides])
    nothing: Any = None
    inputs: Any = SimpleNamespace(config=config)
    waits, times = Waits(), StartTimes()
    assembly = Assembly(inputs, nothing, actors, nothing, nothing, waits, lambda _: None, times)
    learner: Any = Learner(calls)
    assert asyncio.run(assembly._members_up(learner, used)) == 7
    return [call for call in calls if not call.startswith("v ")]


def test_the_canary_goes_past_the_range_that_the_learner_says(tmp_path: Path) -> None:
    """Else engines that differ behind a window would be proved by short prompts alone."""
    folder = model_folder(tmp_path)
    config = load_config([], [f"model.path={folder}", "weights.canary_tokens=2"])
    prompts = [SimpleNamespace(token_ids=[1, 2, 3]), SimpleNamespace(token_ids=[4, 5])]
    source = SimpleNamespace(some_prompts=lambda count: prompts)
    nothing: Any = None
    inputs: Any = SimpleNamespace(config=config, source=source)
    waits, times = Waits(), StartTimes()
    assembly = Assembly(inputs, nothing, nothing, nothing, nothing, waits, lambda _: None, times)
    assert [len(ids) for ids in assembly._proof(nothing, 7).canary.sequences] == [3, 2, 9]
    assert [len(ids) for ids in assembly._proof(nothing, 0).canary.sequences] == [3, 2]


SHARED = ("weights.transport=ipc", "generator.max_staleness=0", "model.max_length=4096")


def test_on_one_device_generators_start_alone_and_sleep_before_the_learner_comes(
    tmp_path: Path,
) -> None:
    folder = model_folder(tmp_path)
    cache = plan_on(load_config([], [f"model.path={folder}", *SHARED]), 80 * GIB).memory
    assert start(folder, 80, *SHARED) == [
        "generator device_bytes",
        f"generator start {cache.kv_cache_bytes}",
        "generator sleep",
        "learner setup",
    ]
    assert start(folder, 80, *SHARED, used=True) == ["generator sleep", "learner setup"]


def test_on_devices_of_their_own_vllm_measures_its_cache_and_nobody_waits(tmp_path: Path) -> None:
    assert start(model_folder(tmp_path), 80) == ["learner setup", "generator start None"]


@pytest.mark.parametrize("device_gib", [40, 80, 141])
@pytest.mark.parametrize("fraction", [0.7, 0.85])
def test_the_cache_leaves_the_learner_what_it_keeps(
    device_gib: int, fraction: float, tmp_path: Path
) -> None:
    """While generators sample, both together have the share, and a step of the learner fits."""
    folder = model_folder(tmp_path)
    keys = [f"model.path={folder}", *SHARED, f"generator.memory_fraction={fraction}"]
    many = ["generator.max_concurrent_sequences=1024", "learner.activation_checkpointing=true"]
    total = device_gib * GIB
    memory = plan_on(load_config([], [*keys, *many, "learner.logits_mib=64"]), total).memory
    sampling = (
        memory.kv_cache_bytes
        + memory.generator.weights
        + memory.generator.activations
        + memory.generator_contexts
        + memory.learner.kept
    )
    assert sampling <= fraction * total * (1 + 1e-9)
    assert memory.learner_needs <= total


@pytest.mark.parametrize("device_gib", [16, 24])
def test_what_does_not_fit_is_refused_before_an_engine_starts(
    device_gib: int, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"do not fit on one device") as refused:
        start(model_folder(tmp_path), device_gib, *SHARED)
    assert "optimiser" in str(refused.value)


def test_a_shape_that_cannot_be_planned_is_named(tmp_path: Path) -> None:
    folder = model_folder(tmp_path)
    shape = {name: value for name, value in SHAPE.items() if name != "intermediate_size"}
    (folder / "config.json").write_text(json.dumps(shape))
    with pytest.raises(UserError, match=r"does not say 'intermediate_size'.*give them two"):
        start(folder, 80, *SHARED)
