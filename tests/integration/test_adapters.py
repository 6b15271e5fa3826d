"""Runs that train adapters on real parts: published either way, resumed, and replayed bitwise."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from run_process import QUICK, finish, inspect, start
from safetensors.torch import load_file

from common.record.metrics import read_metrics
from deploy.inspector.replay import replay

pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]

ADAPTER = ("model.adapter.rank=8", "learner.learning_rate=3e-3", "learner.warmup_steps=0")


@pytest.fixture(scope="module", params=["merged", "adapter"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps, and two more after a resume; under a KL, so that the reference is asked too."""
    folder = tmp_path_factory.mktemp("runs")
    keys = (*QUICK, *ADAPTER, f"runs_dir={folder}", "name=lora", "resume=auto")
    keys = (*keys, f"weights.publish={request.param}")
    keys = (*keys, "generator.max_staleness=0", "algorithm.objective.kl=0.01")
    for steps in (2, 4):
        process = start(*keys, f"steps={steps}")
        output = finish(process, 280)
        assert process.returncode == 0, output
    return folder / "lora"


def test_generators_hold_what_the_learner_computes_with_adapters(run: Path) -> None:
    records = read_metrics(run / "metrics.jsonl")
    assert [record["step"] for record in records] == [0, 1, 2, 3, 4]
    # Were the adapters put beside merged weights after the resume, this would show it.
    assert max(record["canary/gap"] for record in records) < 1e-4
    alone = "publish: adapter" in (run / "config.yaml").read_text()
    sent = {record["publish/bytes"] for record in records[1:]}
    assert len(sent) == 1
    assert (sent.pop() < 4 * 100_000) == alone
    assert max(record["logprob_gap/mean"] for record in records[1:]) < 1e-4


def test_the_reference_is_the_first_model_also_after_the_resume(run: Path) -> None:
    kl = [record["loss/kl"] for record in read_metrics(run / "metrics.jsonl")[1:]]
    assert kl[0] == 0.0
    assert kl[3] > kl[1] > 0.0


def test_a_step_behind_the_resume_is_replayed_bitwise(run: Path) -> None:
    for step in (2, 4):
        found = replay(run, step)
        assert found.compared > 20
        assert found.differences == []


def test_the_checkpoint_is_merged_and_has_its_adapters_beside_it(run: Path) -> None:
    folder = run / "checkpoints" / "step-4"
    names = load_file(folder / "model.safetensors").keys()
    assert not any("lora" in name or "base_layer" in name for name in names)
    assert json.loads((folder / "adapter" / "adapter_config.json").read_text())["r"] == 8
    adapters = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert len(adapters) == 2 * 4 * 7


def test_the_account_closes(run: Path) -> None:
    status, output = inspect(run)
    assert status == 0, output
