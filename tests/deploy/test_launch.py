"""Starting a run: `resume=auto`, and the Python call from wherever it is made."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from run_process import heeding_interrupts

from common.config.load import dump_config, load_config
from common.config.sections import Config
from common.errors import StallError, UserError
from common.record.ledger import Ledger
from common.record.manifest import seal
from deploy import launch
from deploy.launch import Result, train
from deploy.run import lifetime
from deploy.run.directory import RunDirectory
from deploy.run.lifetime import found


def config(folder: Path, *overrides: str) -> Config:
    keys = ["model.path=none", f"runs_dir={folder}", "steps=4", *overrides]
    return load_config([], keys)


def finished(folder: Path, steps: int) -> None:
    run = folder / "job"
    checkpoint = run / "checkpoints" / f"step-{steps}"
    checkpoint.mkdir(parents=True, exist_ok=True)
    (checkpoint / "config.json").write_text("{}")
    seal(checkpoint)
    (run / "config.yaml").write_text(dump_config(config(folder)))
    Ledger(run / "ledger.sqlite", "prompts of the test").end()
    (run / "metrics.jsonl").write_text(json.dumps({"step": steps, "eval/accuracy": 0.5}) + "\n")


def test_the_run_of_the_name_is_found_or_a_new_one_begun(tmp_path: Path) -> None:
    asked = config(tmp_path, "resume=auto", "name=job")
    assert found(asked).resume is None
    finished(tmp_path, 2)
    assert found(asked).resume == str(tmp_path / "job")
    assert found(config(tmp_path, "name=job")).resume is None
    with pytest.raises(UserError, match="needs name="):
        found(config(tmp_path, "resume=auto"))


def test_a_run_that_is_done_is_not_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The retry of a job whose end was not noticed ends well, without starting anything."""
    finished(tmp_path, 4)
    result = train(config(tmp_path, "resume=auto", "name=job"))
    assert result.final == {"step": 4, "eval/accuracy": 0.5}
    assert "is done, 4 steps" in capsys.readouterr().out
    assert not (tmp_path / "job" / "log").exists()


BEGAN, ENDED = threading.Event(), threading.Event()


class FakeRun:
    """A run without its parts: it writes its records and looks at the loop that it is in."""

    def __init__(self, config: Config, run: RunDirectory, *_: object) -> None:
        self._config, self._run = config, run

    async def main(self) -> dict[str, float]:
        try:
            if self._config.name == "endless":
                BEGAN.set()
                await asyncio.sleep(60)
            if self._config.name == "job":
                finished(Path(self._config.runs_dir), self._config.steps)
                raise StallError("the copy in the mirror took too long")
            if self._config.name == "wrong":
                raise UserError("wrong input, say")
            records = [
                {"step": step, "reward/mean": step / 4} for step in range(self._config.steps)
            ]
            records.append({"step": self._config.steps, "eval/accuracy": 0.5})
            text = "".join(json.dumps(record) + "\n" for record in records)
            (self._run.path / "metrics.jsonl").write_text(text)
            return records[-1]
        finally:
            await asyncio.sleep(0.01)  # ending takes a while, and is awaited
            ENDED.set()


class FakeService:
    async def end(self, log: Path) -> None:
        log.mkdir(exist_ok=True)


@pytest.fixture
def preset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A YAML file, for a `train` whose runs start no process."""
    monkeypatch.setattr(lifetime, "Run", FakeRun)
    monkeypatch.setattr(launch, "Service", FakeService)
    BEGAN.clear()
    ENDED.clear()
    path = tmp_path / "mine.yaml"
    path.write_text(f"model: {{path: none}}\nruns_dir: {tmp_path / 'runs'}\n")
    return path


def from_main(call: Callable[[], Any]) -> Any:
    return call()


def from_a_loop(call: Callable[[], Any]) -> Any:
    """As a cell of a notebook, whose loop leaves SIGINT to Python."""

    async def cell() -> Any:
        return call()

    loop = asyncio.new_event_loop()
    try:
        return loop.run_until_complete(cell())
    finally:
        loop.close()


def from_a_thread(call: Callable[[], Any]) -> Any:
    found: list[Any] = []

    def run() -> None:
        try:
            found.append(call())
        except UserError as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(30)
    if isinstance(found[0], UserError):
        raise found[0]
    return found[0]


@pytest.mark.usefixtures("preset")
@pytest.mark.parametrize("resume", ["null", "auto"])
def test_a_failure_behind_the_last_checkpoint_is_none_of_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], resume: str
) -> None:
    """Nothing starts again, and the copy gets the end of the run."""
    copy = tmp_path / "copy"
    result = train(config(tmp_path, "name=job", f"checkpoint.mirror={copy}", f"resume={resume}"))
    assert result.final == {"step": 4, "eval/accuracy": 0.5}
    assert "took too long" in capsys.readouterr().out
    assert (copy / "job" / "checkpoints" / "step-4" / "config.json").is_file()


def test_a_retry_of_a_run_that_is_done_brings_its_copy_up_to_date(tmp_path: Path) -> None:
    finished(tmp_path, 4)
    copy = tmp_path / "copy"
    train(config(tmp_path, "resume=auto", "name=job", f"checkpoint.mirror={copy}"))
    assert (copy / "job" / "checkpoints" / "step-4" / "config.json").is_file()


@pytest.mark.parametrize("place", [from_main, from_a_loop, from_a_thread])
def test_train_works_from_anywhere(place: Callable[..., Any], preset: Path, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    keys = {"batch.group_size": 4, "learner.learning_rate": 1e-5, "learner.compile": False}
    result: Result = place(lambda: train(preset, name="note", steps=3, **keys))
    assert result.path == tmp_path / "runs" / "note"
    assert result.final == {"step": 3, "eval/accuracy": 0.5}
    table = result.metrics()
    assert isinstance(table, pa.Table)
    assert table.column("reward/mean").to_pylist() == [0.0, 0.25, 0.5, None]
    assert table.column("eval/accuracy").to_pylist() == [None, None, None, 0.5]
    written = load_config([result.path / "config.yaml"], [], resolved=True)
    assert (written.steps, written.batch.group_size) == (3, 4)
    assert written.learner.learning_rate == 1e-5
    if place is not from_main:
        assert signal.getsignal(signal.SIGTERM) == before


def test_text_and_paths_reach_the_run_as_they_are(preset: Path, tmp_path: Path) -> None:
    given = {"data.template": "plain", "data.plain_template": "Q: {prompt}  # no\nA:"}
    result = train(preset, name="2025_06_01", steps=1, runs_dir=tmp_path / "else", **given)
    assert result.path == tmp_path / "else" / "2025_06_01"
    written = load_config([result.path / "config.yaml"], [], resolved=True)
    assert written.data.plain_template == given["data.plain_template"]


@pytest.mark.parametrize("place", [from_main, from_a_loop, from_a_thread])
def test_what_a_run_raises_reaches_the_caller(place: Callable[..., Any], preset: Path) -> None:
    with pytest.raises(UserError, match="wrong input, say"):
        place(lambda: train(str(preset), name="wrong"))
    with pytest.raises(UserError, match="did you mean steps"):
        place(lambda: train(preset, step=3))
    assert threading.active_count() < 20


@pytest.fixture
def heeding() -> Iterator[None]:
    with heeding_interrupts():
        yield


@pytest.mark.usefixtures("heeding")
@pytest.mark.parametrize("place", [from_main, from_a_loop])
def test_ctrl_c_ends_the_run_before_it_is_raised(place: Callable[..., Any], preset: Path) -> None:
    def interrupt() -> None:
        BEGAN.wait(30)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        place(lambda: train(preset, name="endless"))
    assert ENDED.is_set()
    assert not any(thread.name == "train" for thread in threading.enumerate())


def test_a_configuration_and_overrides_do_not_go_together(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="give the path of a YAML file"):
        train(config(tmp_path), steps=3)


def test_a_sink_that_is_missing_is_said_before_there_is_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(UserError, match="pip install"):
        train(config(tmp_path, "name=job", "metrics.sinks=[mlflow]"))
    assert list(tmp_path.iterdir()) == []
