"""`plan --devices`: what fits is proposed with its price, and what does not is said."""

from __future__ import annotations

import pytest

from common.config.load import load_config
from common.config.sections import Config
from common.errors import UserError
from deploy.cli import main
from deploy.command.presets import CONFIGS, FOR_DEVICES
from deploy.predict import cluster_plan, propose
from deploy.predict.cluster_plan import ClusterPlan, learner_pools

KINDS = (
    ("1xRTX4090", "Qwen/Qwen2.5-0.5B-Instruct"),
    ("1xL40S", "Qwen/Qwen3-0.6B"),
    ("1xA100-80GB", "Qwen/Qwen2.5-1.5B-Instruct"),
    ("1xH200", "HuggingFaceTB/SmolLM3-3B"),
    ("2xA100-80GB", "Qwen/Qwen2.5-3B-Instruct"),
    ("4xL40S", "Qwen/Qwen3-1.7B"),
    ("4xH100", "Qwen/Qwen2.5-7B-Instruct"),
    ("8xH100", "meta-llama/Llama-3.1-8B-Instruct"),
    ("8xB200", "Qwen/Qwen3-14B"),
    ("2x8xH100", "Qwen/Qwen3-8B"),
)


@pytest.fixture(autouse=True)
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(propose, "_STEPS", 8)
    monkeypatch.setattr(cluster_plan, "_STEPS", 10)


def base(*overrides: str) -> Config:
    keys = ("batch.prompts_per_step=8", *overrides)
    return load_config([CONFIGS / f"{FOR_DEVICES}.yaml"], keys, CONFIGS / "recipes")


@pytest.mark.parametrize(("devices", "model"), KINDS)
def test_what_is_proposed_is_a_configuration_that_fits(devices: str, model: str) -> None:
    config = base(f"model.path={model}")
    wanted = propose.devices_of(devices)
    found = propose.propose(config, wanted)
    # The keys alone, on the same file, give the plan again.
    again = ClusterPlan.of(base(f"model.path={model}", *found.keys(config)))
    assert again.problems == []
    assert again.pools == found.plan.pools
    assert again.pools.devices == wanted.count
    assert again.memory == found.plan.memory
    assert (wanted.count == 1) <= again.pools.shared


def test_what_is_given_up_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    keys = ["model.path=Qwen/Qwen3-0.6B", "batch.prompts_per_step=8"]
    assert main(["plan", "--devices", "1xL4", *keys]) == 0
    text = capsys.readouterr().out
    assert "take turns on the same devices" in text
    assert "weights.transport=ipc" in text
    assert "generator.max_staleness=0" in text
    assert "model.path=Qwen/Qwen3-0.6B\n" in text


@pytest.mark.parametrize(
    ("devices", "model"), [("1xRTX4090", "Qwen/Qwen2.5-7B-Instruct"), ("2xL4", "Qwen/Qwen3-8B")]
)
def test_nothing_fits_is_said_with_what_is_missing(
    devices: str, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "--devices", devices, f"model.path={model}"]) == 2
    error = capsys.readouterr().err
    assert f"nothing fits {model}" in error
    assert "a learner rank needs" in error


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("H100", "give a number"),
        ("0xH100", "give a number"),
        ("1xA100", "say which of A100-40GB, A100-80GB"),
        ("1xB9000", "known are A10-24GB"),
    ],
)
def test_devices_that_are_not_known_are_refused(text: str, answer: str) -> None:
    with pytest.raises(UserError, match=answer):
        propose.devices_of(text)


def test_devices_are_divided_as_people_do() -> None:
    assert learner_pools(8, 8) == [1, 2, 4]
    assert learner_pools(4, 4) == [1, 2]
    assert learner_pools(2, 8) == [1]
    assert learner_pools(64, 8) == [8, 16, 24, 32, 40, 48, 56]
