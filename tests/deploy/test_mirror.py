"""Copies of a run on another file system, and what a resume finds there."""

from __future__ import annotations

import os
import shutil
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
from learner_models import trajectories
from made_up_groups import request_for
from pyarrow import fs

from common.config.sections import Config
from common.errors import RunError, UserError
from common.record.ledger import Ledger
from common.record.manifest import damage, seal
from common.record.trajectory_log import TrajectoryLog, read_log
from common.record.writer import receipt
from deploy.run.directory import RunDirectory
from deploy.run.lifetime import found
from deploy.run.mirror import Mirror


class RunSoFar:
    """A run directory with a ledger and a log that are still open."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir(parents=True)
        (path / "config.yaml").write_text("name: run\n")
        self.ledger = Ledger(path / "ledger.sqlite", "test")
        self._groups = 0
        self._log: TrajectoryLog | None = None

    def group(self) -> None:
        (batch,) = trajectories([(3, [2, 4])], seed=self._groups)
        columns = batch.to_pydict()
        for name in ("group_id", "ticket"):
            columns[name] = [self._groups] * batch.num_rows
        batch = pa.RecordBatch.from_pydict(columns, schema=batch.schema)
        self._log = self._log or TrajectoryLog(self.path / "trajectories", batch.schema)
        self.ledger.dispatched(request_for(batch))
        self._log.append(batch)
        self.ledger.verified(self._groups, 6)
        self._groups += 1
        self.newest = batch

    def step(self, step: int) -> None:
        """One group, trained, and a checkpoint."""
        self.group()
        self.ledger.trained(step, [receipt(self.newest, None)])
        with (self.path / "metrics.jsonl").open("a") as file:
            file.write(f'{{"step": {step}}}\n')
        self.ledger.cut(step)
        folder = self.path / "checkpoints" / f"step-{step}"
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(os.urandom(1000))
        seal(folder)


@pytest.fixture
def run(tmp_path: Path) -> RunSoFar:
    made = RunSoFar(tmp_path / "here" / "run")
    made.step(1)
    return made


def content(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in files
        if not path.name.startswith(("ledger", "."))
    }


@pytest.mark.parametrize("form", ["path", "uri"])
def test_another_machine_goes_on_from_the_copy(run: RunSoFar, tmp_path: Path, form: str) -> None:
    there = tmp_path / "there"
    place = there.as_uri() if form == "uri" else str(there)
    Mirror(place).push(run.path)
    run.group()  # logged and in the ledger after the copy was made
    here = tmp_path / "elsewhere" / "run"
    said: list[str] = []
    assert Mirror(place).pull(here, said.append)
    assert said == [f"{here} is made from its copy in {place}"]
    assert damage(here / "checkpoints" / "step-1") is None
    assert len(list(read_log(here / "trajectories"))) == 1
    ledger = Ledger(here / "ledger.sqlite", "test")
    assert ledger.roll_back(1) == []
    assert ledger.cursor() == (1, [])
    Mirror(place).push(run.path)
    shutil.rmtree(here)
    Mirror(place).pull(here, said.append)
    assert content(here) == content(run.path)
    assert [g.group_id for g in Ledger(here / "ledger.sqlite", "test").roll_back(1)] == [1]


def test_only_what_changed_is_copied_and_pruned_checkpoints_go(
    run: RunSoFar, tmp_path: Path
) -> None:
    mirror = Mirror(str(tmp_path / "there"))
    first = mirror.push(run.path)
    ledger_alone = mirror.push(run.path)
    assert ledger_alone == (tmp_path / "there/run/ledger.sqlite").stat().st_size < first
    run.step(2)
    shutil.rmtree(run.path / "checkpoints" / "step-1")
    mirror.push(run.path)
    assert [p.name for p in (tmp_path / "there/run/checkpoints").iterdir()] == ["step-2"]
    time.sleep(0.01)
    metrics = run.path / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace("2", "3"))  # as long as before
    mirror.push(run.path)
    assert (tmp_path / "there/run/metrics.jsonl").read_text() == metrics.read_text()


def test_a_copy_that_was_interrupted_anywhere_can_be_resumed_from(
    run: RunSoFar, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second copy ends after each number of files."""
    Mirror(str(tmp_path / "there")).push(run.path)
    run.step(2)
    reached = set()
    for most in range(8):
        place = shutil.copytree(tmp_path / "there", tmp_path / f"there-{most}")
        with monkeypatch.context() as patch:
            interrupt_after(most, patch)
            with suppress(RunError):
                Mirror(str(place)).push(run.path)
        here = tmp_path / f"here-{most}" / "run"
        assert Mirror(str(place)).pull(here, print)
        step = RunDirectory(here).newest_checkpoint(print)
        reached.add(step)
        open_groups = Ledger(here / "ledger.sqlite", "test").roll_back(step)
        logged = {b.column("group_id")[0].as_py() for b in read_log(here / "trajectories")}
        assert {group.group_id for group in open_groups} <= logged
    assert reached == {1, 2}


def interrupt_after(files: int, patch: pytest.MonkeyPatch) -> None:
    put, left = Mirror._put, [files]

    def limited(self: Mirror, path: Path, name: str) -> int:
        if not left[0]:
            raise OSError("the network is gone")
        left[0] -= 1
        return put(self, path, name)

    patch.setattr(Mirror, "_put", limited)


def test_auto_takes_the_run_that_is_here_before_its_copy(run: RunSoFar, tmp_path: Path) -> None:
    there = tmp_path / "there"
    Mirror(str(there)).push(run.path)
    config = Config(name="run", runs_dir=str(run.path.parent), resume="auto")
    config.checkpoint.mirror = str(there)
    (run.path / "config.yaml").write_text("name: mine\n")
    assert found(config).resume == str(run.path)
    assert (run.path / "config.yaml").read_text() == "name: mine\n"
    config.runs_dir = str(tmp_path / "new")
    assert found(config).resume == str(tmp_path / "new" / "run")
    assert (tmp_path / "new" / "run" / "config.yaml").read_text() == "name: run\n"
    config.name = "other"
    assert found(config).resume is None
    assert not (tmp_path / "new" / "other").exists()


def test_places_that_cannot_be_are_refused(run: RunSoFar, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"checkpoint\.mirror=ftp://x/y: .*use s3://"):
        Mirror("ftp://x/y")
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(RunError, match="cannot be copied to checkpoint.mirror"):
        Mirror(str(tmp_path / "file")).push(run.path)


@pytest.mark.parametrize("place", ["here", "here/run", "here/run/copies"])
def test_a_copy_onto_the_run_itself_is_refused(run: RunSoFar, tmp_path: Path, place: str) -> None:
    """It would take the ledger from under the connection that writes it."""
    before = (run.path / "ledger.sqlite").stat().st_ino
    with pytest.raises(UserError, match="onto itself: name a place outside runs_dir"):
        Mirror(str(tmp_path / place)).push(run.path)
    assert (run.path / "ledger.sqlite").stat().st_ino == before


def test_a_home_folder_is_one(run: RunSoFar, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    Mirror("~/copies").push(run.path)
    assert (tmp_path / "home" / "copies" / "run" / "config.yaml").is_file()


def test_an_object_store_gets_every_file_in_one_write(
    run: RunSoFar, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There a rename is a copy, and a file is there when all of it is."""
    store = fs._MockFileSystem()
    monkeypatch.setattr("deploy.run.mirror._WHOLE_WRITES", (store.type_name,))
    opened = SimpleNamespace(from_uri=lambda uri: (store, "bucket/runs"))
    monkeypatch.setattr("deploy.run.mirror.fs.FileSystem", opened)
    Mirror("s3://bucket/runs").push(run.path)
    names = [info.path for info in store.get_file_info(fs.FileSelector("bucket", recursive=True))]
    assert "bucket/runs/run/checkpoints/step-1/manifest.json" in names
    assert not any("partial" in name for name in names)
    assert Mirror("s3://bucket/runs").pull(tmp_path / "back" / "run", print)
    assert content(tmp_path / "back" / "run") == content(run.path)
