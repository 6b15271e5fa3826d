"""Runs whose adapters travel alone (`weights.publish=adapter`): what they begin from and plan."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from architectures import save_model

from common.config.load import load_config
from common.config.sections import Config
from common.devices import device
from common.errors import UserError
from deploy.command.presets import CONFIGS, load
from deploy.eval.settings import Options, evaluation_config
from deploy.models.resolve import ModelLocation
from deploy.placement import memory
from deploy.placement.devices import on_these_devices
from deploy.predict.cluster_plan import ClusterPlan
from deploy.predict.propose import Devices as Machine
from deploy.predict.propose import _with
from deploy.run import inputs as inputs_module
from deploy.run.actors import ActorFactory, learner_job
from deploy.run.directory import RunDirectory
from deploy.run.inputs import find_inputs
from deploy.run.replacements import Replacements

ADAPTER = ("model.adapter.rank=8", "learner.learning_rate=3e-3")
ALONE = (*ADAPTER, "weights.publish=adapter")
OTHERS = "or weights.publish=merged"


def config(*keys: str) -> Config:
    return load(CONFIGS / "tiny.yaml", [*keys])


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (("weights.transport=nccl",), "through weights.transport=object_store alone, and weights."),
        (("weights.transport=ipc", "generator.max_staleness=0"), "weights.transport=ipc: use that"),
        (("model.adapter.rank=513",), "rank 512 at most, and model.adapter.rank=513: lower it"),
        (("generator.pipeline_parallel=2",), "pipeline_parallel=2 divides the layers"),
    ],
)
def test_what_was_not_measured_is_refused_with_a_way_out(keys: tuple[str, ...], words: str) -> None:
    with pytest.raises(UserError, match=words) as raised:
        config(*ALONE, *keys)
    assert OTHERS in str(raised.value)
    merged = config(*ALONE, *keys, "weights.publish=merged")
    assert merged.served_adapter is None


def found(
    at: Path, asked: Config, monkeypatch: pytest.MonkeyPatch, step: int
) -> inputs_module.Inputs:
    """What a run finds that goes on from a checkpoint of `step`; 0: that begins."""
    run = RunDirectory.create(replace(asked, runs_dir=str(at), name=f"run-{step}"))
    monkeypatch.setattr(
        inputs_module,
        "find_prompts",
        lambda *_: SimpleNamespace(quarantine=SimpleNamespace(rows=[])),
    )
    monkeypatch.setattr(RunDirectory, "newest_checkpoint", lambda *_: step)
    return find_inputs(replace(asked, resume=str(run.path) if step else None), run, lambda _: None)


def test_after_a_resume_adapters_stand_beside_the_model_the_run_began_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint is merged: beside it the adapters would count twice."""
    base = str(save_model(tmp_path / "base", "llama_tied"))
    for way, folder in (("adapter", base), ("merged", None)):
        asked = config(*ADAPTER, f"weights.publish={way}", f"model.path={base}")
        assert found(tmp_path / way, asked, monkeypatch, 0).config.model.path == base
        again = found(tmp_path / way, asked, monkeypatch, 4)
        wanted = folder or str(tmp_path / way / "run-4" / "checkpoints" / "step-4")
        assert again.config.model.path == wanted
        # The learner's frozen weights are the first ones either way.
        job = learner_job(again.config, again.origin)
        assert (job.trained_path, job.publish) == (base, way)


def test_a_generator_that_starts_again_reads_the_base_or_says_that_it_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str]] = []
    gone = str(tmp_path / "gone")

    def remember(self: Any, name: str, folder: str) -> None:
        asked.append((name, folder))

    monkeypatch.setattr(ActorFactory, "generator", remember)
    run: Any = SimpleNamespace(
        newest_checkpoint=lambda _: 4, checkpoint=lambda step: tmp_path / f"step-{step}"
    )
    for keys in (ALONE, ADAPTER):
        at = config(*keys)
        at = replace(at, model=replace(at.model, path=gone))
        nothing: Any = None
        factory = ActorFactory(at, nothing, False, 0, ModelLocation("owner/none", gone))
        Replacements(factory, run, nothing, print)._generator("generator-0")
    assert asked == [("generator-0", gone), ("generator-0", str(tmp_path / "step-4"))]


def test_an_evaluation_serves_whole_weights() -> None:
    options = Options("x", ["arithmetic-small"], overrides=["model.adapter.rank=8"])
    assert evaluation_config(options).served_adapter is None


def test_little_is_on_the_way_and_a_generator_has_room_for_adapters() -> None:
    keys = ["model.path=x", "model.dtype=bfloat16", "model.adapter.rank=12"]
    merged, alone = (
        memory.estimate(load_config([], [*keys, f"weights.publish={way}"]), 10**9, adapters=12_000)
        for way in ("merged", "adapter")
    )
    assert merged.transfer == 3 * 2 * 10**9
    assert alone.transfer == 3 * 4 * 12_000
    assert alone.generators - merged.generators == 2 * 2 * 16_000  # vLLM's next rank is 16
    assert alone.learner == merged.learner


def test_a_plan_for_devices_counts_what_travels() -> None:
    keys = ["model.adapter.rank=16", "weights.transport=object_store", "generator.max_staleness=1"]
    preset = CONFIGS / "qwen2.5-7b-2x8.yaml"
    merged, alone = (
        ClusterPlan.of(load(preset, [*keys, f"weights.publish={way}"]))
        for way in ("merged", "adapter")
    )
    assert alone.costs().export_s < 0.02 * merged.costs().export_s
    assert alone.costs().stall_s < merged.costs().stall_s
    room = alone.memory.generator.weights - merged.memory.generator.weights
    assert room == 2 * alone.memory.load.adapters
    assert any("published     the adapters alone, 161.5 MB" in x for x in alone.memory_lines())
    assert device("placement.generator_device", "H100-80GB") is not None


def test_on_one_device_adapters_cannot_travel_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match=r"one CUDA device here.*weights\.publish=merged"):
        on_these_devices(config(*ALONE))
    assert on_these_devices(config(*ADAPTER))[0].weights.transport == "ipc"


def test_a_proposal_sends_adapters_merged_by_what_carries_none_alone() -> None:
    machine = Machine(1, 8, "H100-80GB")
    assert _with(config(*ALONE), "nccl", 4, 1, 4, machine).weights.publish == "merged"
    assert _with(config(*ALONE), "object_store", 4, 1, 4, machine).weights.publish == "adapter"
