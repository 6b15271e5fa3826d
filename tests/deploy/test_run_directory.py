"""Run directories and metrics files: one owner, every step once."""

from __future__ import annotations

import fcntl
import json
import math
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from common.config.load import load_config
from common.errors import UserError
from common.record.manifest import seal
from common.record.metrics import JsonlSink, read_metrics
from deploy.run import inputs
from deploy.run.directory import RunDirectory


def create(tmp_path: Path, name: str = "mine") -> RunDirectory:
    return RunDirectory.create(
        load_config([], ["model.path=x", f"runs_dir={tmp_path}", f"name={name}"])
    )


def test_a_name_is_used_once_and_the_message_says_how_to_go_on(tmp_path: Path) -> None:
    create(tmp_path)
    with pytest.raises(UserError, match="resume="):
        create(tmp_path)
    for elsewhere in ("../elsewhere", ".", ".."):
        with pytest.raises(UserError, match="letters, digits"):
            create(tmp_path, elsewhere)


def test_a_resume_under_other_keys_says_which(tmp_path: Path) -> None:
    """As with a `--config` beside it, whose `steps` are not the run's."""
    keys = ["model.path=x", f"runs_dir={tmp_path}", "name=mine", "verifier.rules=[{name: m:f}]"]
    run = RunDirectory.create(load_config([], [*keys, "steps=30"]))
    said: list[str] = []
    resumed = [*keys, f"resume={run.path}", "name=null"]
    inputs._compare(load_config([], [*resumed, "steps=30"]), run, said.append)
    assert said == []
    inputs._compare(load_config([], [*resumed, "steps=60", "eval.every=9"]), run, said.append)
    assert len(said) == 1
    assert "steps=60 (was 30)" in said[0] and "eval.every=9 (was " in said[0]
    (run.path / "config.yaml").write_text("stps: 3")
    inputs._compare(load_config([], [*resumed, "steps=60"]), run, said.append)
    assert "cannot be compared" in said[1]
    run.release()


def test_two_processes_never_train_in_one_directory(tmp_path: Path) -> None:
    run = create(tmp_path)
    with pytest.raises(UserError, match="another process"):
        RunDirectory.reopen(str(run.path))
    (run.path / "metrics.jsonl").touch()
    run.release()
    RunDirectory.reopen(str(run.path)).release()
    with pytest.raises(UserError, match=r"no config\.yaml"):
        RunDirectory.reopen(str(tmp_path))


def test_a_look_at_the_lock_is_no_process_that_trains(tmp_path: Path) -> None:
    run = create(tmp_path)
    (run.path / "metrics.jsonl").touch()
    run.release()
    looking = (run.path / ".lock").open()
    fcntl.flock(looking, fcntl.LOCK_SH)
    gone = threading.Timer(0.2, looking.close)
    gone.start()
    RunDirectory.reopen(str(run.path)).release()
    gone.join()


def test_only_whole_checkpoints_count_and_old_ones_go(tmp_path: Path) -> None:
    run = create(tmp_path)
    assert run.checkpoints() == []
    for step in (5, 10, 20):
        run.checkpoint(step).mkdir(parents=True)
    (run.path / "checkpoints" / "step-30.partial").mkdir()
    assert run.checkpoints() == [5, 10, 20]
    run.prune_checkpoints(newest=20, keep_last=2, keep_every=0)
    assert run.checkpoints() == [10, 20]
    run.prune_checkpoints(newest=20, keep_last=0, keep_every=0)
    assert run.checkpoints() == [10, 20]
    run.checkpoint(25).mkdir()
    run.prune_checkpoints(newest=25, keep_last=1, keep_every=20)
    assert run.checkpoints() == [20, 25]


def test_a_damaged_later_checkpoint_does_not_take_the_place_of_a_whole_one(
    tmp_path: Path,
) -> None:
    """Step 40 was torn, the run went on from 20 and was stopped at 25."""
    run = create(tmp_path)
    for step in (20, 25, 40):
        run.checkpoint(step).mkdir(parents=True)
        (run.checkpoint(step) / "config.json").write_text("{}")
        seal(run.checkpoint(step))
    (run.checkpoint(40) / "config.json").write_text("torn")
    run.prune_checkpoints(newest=25, keep_last=1, keep_every=0)
    assert run.checkpoints() == [25, 40]
    assert run.newest_checkpoint(lambda line: None) == 25


@pytest.mark.parametrize(
    ("break_it", "wrong"),
    [
        (
            lambda folder: (folder / "inside" / "b").write_bytes(b"12x45"),
            "inside/b is not what was",
        ),
        (lambda folder: (folder / "a").write_bytes(b"1"), "a has 1 bytes, not 3"),
        (lambda folder: (folder / "a").unlink(), "a is missing"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "manifest.json cannot be read"),
        (lambda folder: (folder / "manifest.json").unlink(), "manifest.json cannot be read"),
    ],
)
def test_a_torn_checkpoint_is_passed_over_with_a_warning(
    tmp_path: Path, break_it: Callable[[Path], None], wrong: str
) -> None:
    run = create(tmp_path)
    said: list[str] = []
    assert run.newest_checkpoint(said.append) == 0
    for step in (5, 10):
        folder = run.checkpoint(step)
        (folder / "inside").mkdir(parents=True)
        (folder / "a").write_bytes(b"abc")
        (folder / "inside" / "b").write_bytes(b"12345")
        seal(folder)
    assert run.newest_checkpoint(said.append) == 10
    assert said == []
    break_it(run.checkpoint(10))
    assert run.newest_checkpoint(said.append) == 5
    assert len(said) == 1
    assert f"{run.checkpoint(10)} is damaged, passed over: {wrong}" in said[0]


def test_metrics_of_steps_after_the_checkpoint_are_taken_back_on_resume(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(path)
    for step in range(5):
        sink.write(step, {"reward/mean": step / 4})
    sink.close()
    path.write_text(path.read_text() + '{"step": 5, "rew')  # killed in the middle of a line
    resumed = JsonlSink(path, last_step=3)
    resumed.write(4, {"reward/mean": 9.0, "loss/policy": math.nan})
    resumed.close()
    records = read_metrics(path)
    assert [record["step"] for record in records] == [0, 1, 2, 3, 4]
    assert records[-1] == {"step": 4, "loss/policy": None, "reward/mean": 9.0}
    assert json.loads(path.read_text().splitlines()[0]) == {"step": 0, "reward/mean": 0.0}


def test_a_run_that_never_started_frees_its_name(tmp_path: Path) -> None:
    create(tmp_path).release()
    create(tmp_path).release()
