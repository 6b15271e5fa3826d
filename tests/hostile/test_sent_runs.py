"""A run directory that somebody sent: nothing in it runs, is resolved, or crashes a reader."""

from __future__ import annotations

import os
import pickle
import random
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from inspector_runs import sums_run
from learner_models import trajectories
from torch.distributed.checkpoint.state_dict_saver import save

from common.config.load import load_config
from common.errors import UserError
from common.record.manifest import damage
from deploy.inspector.run_data import RunData
from learner.training.fsdp import serve_rendezvous
from learner.training.pickles import check_metadata, plain_values_only


class Runs:
    def __reduce__(self) -> Any:
        return os.system, ("touch ran",)


def saved(folder: Path) -> Path:
    model = torch.nn.Linear(2, 2).to(torch.bfloat16)
    state = {"model": model.state_dict(), "lr": 0.1, "betas": (0.9, 0.99), "foreach": None}
    save(state, checkpoint_id=str(folder))
    return folder / ".metadata"


def test_the_metadata_of_a_checkpoint_is_read(tmp_path: Path) -> None:
    check_metadata(saved(tmp_path))


@pytest.mark.parametrize("protocol", range(6))
def test_metadata_that_would_run_something_is_refused(tmp_path: Path, protocol: int) -> None:
    path = saved(tmp_path)
    path.write_bytes(pickle.dumps([pickle.loads(path.read_bytes()), Runs()], protocol))
    with pytest.raises(UserError, match="system|GLOBAL|PUT"):
        check_metadata(path)


@pytest.mark.parametrize(
    "crafted",
    [
        b"\x80\x04cposix\nsystem\n\x8c\x04true\x85R.",  # a name of its own instruction
        b"\x80\x04\x8c\x05posix\x94\x8c\x06system\x94h\x00h\x01\x93\x8c\x04true\x85R.",  # the memo
        b"\x80\x04\x8c\x05posix\x8c\x06system0\x8c\x06system\x93.",  # names that were dropped
        b"\x80\x04\x8c\x05torch\x8c\x04Size\x8c\x05posix\x8c\x06system\x93.",
        b"\x80\x04\x8c\x05torchq\x00.",
        b"nothing of the kind",
        b"",
    ],
)
def test_crafted_metadata_is_refused(tmp_path: Path, crafted: bytes) -> None:
    path = tmp_path / ".metadata"
    path.write_bytes(crafted)
    with pytest.raises(UserError):
        check_metadata(path)


def test_settings_of_an_optimiser_are_plain_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(Runs(), tmp_path / "lr")
    torch.save({"betas": (0.9, 0.99), "fused": None}, tmp_path / "betas")
    with plain_values_only():
        assert torch.load(tmp_path / "betas", weights_only=False)["betas"] == (0.9, 0.99)
        with pytest.raises(pickle.UnpicklingError):
            torch.load(tmp_path / "lr", weights_only=False)
    assert not (tmp_path / "ran").exists()


def sent(run: Path, config: str) -> RunData:
    sums_run(run, steps=1, per_step=1)
    (run / "config.yaml").write_text(config, encoding="latin-1")
    return RunData(run)


@pytest.mark.parametrize("value", ["${oc.env:HOME}", "${"])
def test_the_inspector_resolves_nothing(tmp_path: Path, value: str) -> None:
    facts = sent(tmp_path / "run", f"model: {{path: '{value}'}}").facts()
    assert value in facts["config"]
    assert f"model.path={os.environ['HOME']}" not in repr(facts)


@pytest.mark.parametrize("text", ["[1, 2]", "model: [1]", "a: [", "\xff"])
def test_the_inspector_says_what_is_no_configuration(tmp_path: Path, text: str) -> None:
    with pytest.raises(UserError, match="no configuration of a run"):
        sent(tmp_path / "run", text)


@pytest.mark.parametrize("text", ["steps: ${oc.env:STEPS}", "name: '${'", "name: x${oc.env:HOME}"])
def test_a_run_that_is_resumed_resolves_nothing(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=r"interpolation|not valid YAML"):
        load_config([path], [], resolved=True)


READER = """
import sys
from pathlib import Path
from common.record.trajectory_log import read_log
from deploy.inspector.segments import LogIndex
for folder in sys.argv[1:]:
    try:
        for batch in read_log(Path(folder)):
            batch.to_pylist()
        index = LogIndex(Path(folder))
        index.refresh()
        for segment in index.segments:
            for row in range(segment.groups.num_rows):
                segment.group(row).to_pylist()
    except Exception as error:
        print("damage", type(error).__name__, str(error).replace("\\n", " "))
"""


def test_a_flipped_byte_in_a_segment_crashes_no_reader(tmp_path: Path) -> None:
    generator = random.Random(0)
    whole = tmp_path / "whole.arrow"
    batches = trajectories([(5, [3, 4]), (6, [2, 7])])
    schema = batches[0].schema
    with pa.OSFile(str(whole), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        for batch in batches:
            writer.write_batch(batch)
    content = whole.read_bytes()
    folders = []
    for number in range(240):
        folder = tmp_path / str(number)
        folder.mkdir()
        spoiled = bytearray(content)
        for _ in range(3):
            spoiled[generator.randrange(len(spoiled))] = generator.randrange(256)
        (folder / "segment-000000.arrow").write_bytes(spoiled)
        folders.append(str(folder))
    done = subprocess.run(
        [sys.executable, "-c", READER, *folders],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = [line for line in done.stdout.splitlines() if line.startswith("damage ")]
    assert found
    assert {line.split()[1] for line in found} <= {"UserError", "RunError"}, done.stdout


@pytest.mark.parametrize("text", ["[]", "null", '{"a": 1}', "{}", '{"a": [1]}', "[" * 100_000])
def test_a_manifest_that_is_none_is_damage(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    assert damage(tmp_path) is not None


def test_the_rendezvous_of_one_host_is_not_reached_from_another() -> None:
    _, host, port = serve_rendezvous(1, 10.0)
    assert host == "127.0.0.1"
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", port), timeout=2.0)
