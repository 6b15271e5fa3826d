"""The real packages of the extras, each where it is installed: what they store of a resumed run."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from common.config.load import load_config
from common.record.metrics import read_metrics
from deploy.run.metric_sinks import check_sinks, open_metrics

BLOCK = 32768


def record(steps: range, sink: str, folder: Path, last_step: int | None = None) -> None:
    keys = ["model.path=none", f"metrics.sinks=[{sink}]", "metrics.project=trial", "steps=20"]
    config = load_config([], [*keys, "metrics.timeout_s=120"])
    check_sinks(config.metrics)
    said: list[str] = []
    with open_metrics(config, folder, last_step, said.append) as metrics:
        for step in steps:
            metrics.write(step, {"reward/mean": step / 100, "grad_norm": float("inf")})
    assert said == []


def twenty_steps_with_a_resume(sink: str, folder: Path) -> None:
    """Ended after step 12, the checkpoint of step 10: steps 11 and 12 come again."""
    folder.mkdir()
    record(range(13), sink, folder)
    record(range(11, 21), sink, folder, last_step=10)
    assert [r["step"] for r in read_metrics(folder / "metrics.jsonl")] == list(range(21))


EXPECTED = {step: step / 100 for step in range(21)}


def test_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow", reason="the extra `mlflow` is not installed")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    twenty_steps_with_a_resume("mlflow", tmp_path / "run")
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("trial")
    (run,) = client.search_runs([experiment.experiment_id])
    history = client.get_metric_history(run.info.run_id, "reward/mean")
    assert [(m.step, m.value) for m in history] == list(EXPECTED.items())
    assert run.data.params["batch.group_size"] == "8"
    assert run.data.metrics["summary/reward"] == 0.2
    assert (run.info.status, run.info.run_name) == ("FINISHED", "run")


def test_trackio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read as it is imported
    pytest.importorskip("trackio", reason="the extra `trackio` is not installed")
    from trackio.sqlite_storage import SQLiteStorage

    twenty_steps_with_a_resume("trackio", tmp_path / "run")
    (run,) = SQLiteStorage.get_runs("trial")
    logs = SQLiteStorage.get_logs("trial", run)
    found = [(log["step"], log["reward/mean"]) for log in logs if "reward/mean" in log]
    assert found == list(EXPECTED.items())
    assert [log["summary/reward"] for log in logs if "summary/reward" in log][-1] == 0.2
    assert SQLiteStorage.get_run_config("trial", run)["batch.group_size"] == 8


def test_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    wandb = pytest.importorskip("wandb", reason="the extra `wandb` is not installed")
    twenty_steps_with_a_resume("wandb", tmp_path / "run")
    wandb.teardown()
    files = sorted((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 2
    assert len({file.stem for file in files}) == 1  # one id: `wandb sync` makes one run of them
    items = [item for file in files for item in history(file)]
    found = [(int(i["_step"]), float(i["reward/mean"])) for i in items if "reward/mean" in i]
    assert found == list(EXPECTED.items())
    assert all("grad_norm" not in item for item in items)


def history(path: Path) -> Iterator[dict[str, Any]]:
    """The history records of W&B's offline file."""
    from wandb.proto.wandb_internal_pb2 import Record

    for content in leveldb_records(path.read_bytes()):
        entry = Record()
        entry.ParseFromString(content)
        if entry.HasField("history"):
            yield {
                (item.key or ".".join(item.nested_key)): item.value_json.strip('"')
                for item in entry.history.item
            } | {"_step": entry.history.step.num}


def leveldb_records(data: bytes) -> Iterator[bytes]:
    """Records of a LevelDB log behind W&B's seven bytes of header.

    Blocks of 32 KiB; a record is crc (4), length (2), kind (1: whole, 2: first, 3: middle, 4: last)
    and its bytes; a rest of a block under seven bytes is padding.
    """
    at, parts = 7, b""
    while at + 7 <= len(data):
        if BLOCK - at % BLOCK < 7:
            at += BLOCK - at % BLOCK
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield parts
            parts = b""
