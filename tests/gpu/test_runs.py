"""Whole runs on CUDA devices: on one in turns, on two apart, on several a generator."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

ROOT = Path(__file__).resolve().parents[2]
TINY = ("--config", "deploy/configs/tiny.yaml", "model.dtype=bfloat16", "eval.prompts=16")
_SLACK_BYTES = 300 * 2**20

pytestmark = [pytest.mark.timeout(1500)]
Record = Callable[[str, object], None]


def train(folder: Path, devices: int, *words: str) -> list[dict[str, Any]]:
    """The records of a run on the first `devices` devices, and nothing left on them after it."""
    seen = {"CUDA_VISIBLE_DEVICES": ",".join(map(str, range(devices)))}
    before = [torch.cuda.mem_get_info(index)[0] for index in range(devices)]
    command = [sys.executable, "-m", "deploy.cli", "train", *words]
    done = subprocess.run(
        [*command, f"runs_dir={folder}", "name=run"],
        cwd=ROOT,
        env=os.environ | seen,
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    for index, free in enumerate(before):
        until_free(index, free - _SLACK_BYTES)
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def until_free(index: int, wanted: float) -> None:
    """A process that outlived its run would keep the device."""
    ends = time.monotonic() + 60
    while (free := torch.cuda.mem_get_info(index)[0]) < wanted:
        assert time.monotonic() < ends, f"device {index}: {free} bytes free of {wanted:.0f}"
        time.sleep(1)


def report(records: list[dict[str, Any]], steps: int, record_property: Record) -> None:
    assert records[-1]["step"] == steps
    trained = [record for record in records if record["step"] > 0]
    record_property("canary_gap", max(f"{record['canary/gap']:.4f}" for record in records))
    for name in ("time/step", "time/export", "time/publish", "logprob_gap/mean"):
        record_property(name, f"{trained[-1][name]:.3f}")


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((folder / "run" / "config.yaml").read_text())
    return found


@pytest.mark.gpu
def test_one_device_is_shared_in_turns(tmp_path: Path, record_property: Record) -> None:
    """What `make train` does on most machines, but for its number of steps."""
    records = train(tmp_path, 1, "--config", "deploy/configs/smollm2.yaml", "steps=4")
    config = config_of(tmp_path)
    assert config["weights"]["transport"] == "ipc"
    assert config["generator"]["max_staleness"] == 0
    report(records, 4, record_property)


@pytest.mark.gpu
def test_a_run_on_one_device_goes_on_from_its_checkpoint(
    tmp_path: Path, record_property: Record
) -> None:
    train(tmp_path, 1, *TINY, "steps=3", "checkpoint.every=2")
    report(train(tmp_path, 1, *TINY, "steps=6", "resume=auto"), 6, record_property)


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_graphs_of_a_generator_survive_its_sleep(
    compiled: bool, tmp_path: Path, record_property: Record
) -> None:
    words = [*TINY, "steps=4", f"generator.enforce_eager={not compiled}"]
    report(train(tmp_path, 1, *words), 4, record_property)


@pytest.mark.gpu(devices=2)
@pytest.mark.parametrize("transport", ["nccl", "object_store"])
def test_two_devices_work_at_once(transport: str, tmp_path: Path, record_property: Record) -> None:
    records = train(
        tmp_path, 2, "--config", "deploy/configs/smollm2.yaml", "steps=6", "eval.prompts=16",
        f"weights.transport={transport}",
    )  # fmt: skip
    report(records, 6, record_property)


@pytest.mark.gpu(devices=2)
def test_two_devices_are_shared_in_turns(tmp_path: Path, record_property: Record) -> None:
    words = ["generator.count=2", "learner.ranks=2", "generator.max_staleness=0"]
    report(
        train(tmp_path, 2, *TINY, "steps=4", "weights.transport=ipc", *words), 4, record_property
    )


@pytest.mark.gpu(devices=3)
@pytest.mark.parametrize("split", ["tensor_parallel", "pipeline_parallel"])
def test_a_generator_of_two_devices(split: str, tmp_path: Path, record_property: Record) -> None:
    words = [f"generator.{split}=2", "weights.transport=nccl"]
    report(train(tmp_path, 3, *TINY, "steps=4", *words), 4, record_property)


@pytest.mark.gpu(devices=4)
def test_two_ranks_and_two_generators(tmp_path: Path, record_property: Record) -> None:
    words = ["generator.count=2", "learner.ranks=2", "weights.transport=nccl"]
    report(train(tmp_path, 4, *TINY, "steps=4", *words), 4, record_property)


@pytest.mark.gpu
def test_the_variable_length_kernel_is_proved_and_trains(
    tmp_path: Path, record_property: Record
) -> None:
    records = train(tmp_path, 1, *TINY, "steps=4", "learner.attention=varlen")
    report(records, 4, record_property)
