"""What `grpo-lambda prune` takes, and that a resume and the account miss none of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from inspector_runs import Sample, SyntheticRun

from common.errors import RunError, UserError
from common.record.credit_log import credit_steps
from common.record.ledger import Ledger
from common.record.manifest import seal
from common.record.pruned import needed_groups, pruned_tokens
from common.record.trajectory_log import missing_segments, read_log, segments
from deploy.cli import main
from deploy.inspector.account import account_of, log_problems
from deploy.inspector.replay import step_batches
from deploy.inspector.run_data import RunData
from deploy.run import pruning
from deploy.run.directory import LEDGER, RunDirectory
from deploy.run.pruning import prune

STEPS, LAST_CHECKPOINT = 6, 4


def quiet(line: str) -> None:
    """Say nothing."""


def run_at(path: Path, loose: int | None = None) -> Path:
    """Six steps of a segment each, checkpoints of steps 2 and 4.

    Args:
        loose: this step leaves one group verified that no step has trained.
    """
    made = SyntheticRun(path, segment_bytes=1)
    for step in range(1, STEPS + 1):
        made.group(step, "What is 40 + 2?", [Sample("42", 1.0), Sample("41")], step - 1)
        made.step(step, [step])
        if step == loose:
            made.group(100, "What is 1 + 1?", [Sample("2", 1.0), Sample("3")], step)
        if step in (2, LAST_CHECKPOINT):
            made.ledger.cut(step)
            (path / "checkpoints" / f"step-{step}").mkdir()
            (path / "checkpoints" / f"step-{step}" / "model.safetensors").write_bytes(b"weights")
            seal(path / "checkpoints" / f"step-{step}")
    made.close()
    return path


def in_log(run: Path) -> set[int]:
    return {batch.column("group_id")[0].as_py() for batch in read_log(run / "trajectories")}


def resumed(run: Path, step: int) -> list[int]:
    """Groups that a resume from `step` asks the log for."""
    ledger = Ledger(run / LEDGER, "synthetic")
    opened = [group.group_id for group in ledger.roll_back(step)]
    ledger.end()
    return opened


def test_a_resume_and_the_account_miss_nothing(tmp_path: Path) -> None:
    run = run_at(tmp_path / "run")
    before = account_of(run / LEDGER)
    found, size = prune(run, 0, False, quiet)
    assert in_log(run) == {5, 6}
    assert found.tokens.keys() == {1, 2, 3, 4}
    assert size > 0
    assert not any(path.exists() for path in found.files)
    assert not list((run / "trajectories").glob("segment-000000.*"))
    assert credit_steps(run) == [5, 6]
    assert missing_segments(run / "trajectories") == []
    assert log_problems(run) == []
    assert account_of(run / LEDGER) == before
    assert set(resumed(run, LAST_CHECKPOINT)) <= in_log(run)
    assert log_problems(run) == []
    assert RunData(run).facts()["groups"] == STEPS


def test_what_is_not_done_with_stays_and_all_behind_it(tmp_path: Path) -> None:
    run = run_at(tmp_path / "run", loose=2)  # the end of the run cut it off: a resume takes it back
    prune(run, 0, False, quiet)
    assert in_log(run) == {100, 3, 4, 5, 6}
    assert 100 in resumed(run, LAST_CHECKPOINT)


def test_the_last_steps_are_kept_where_asked(tmp_path: Path) -> None:
    run = run_at(tmp_path / "run")
    prune(run, 2, False, quiet)
    assert in_log(run) == {3, 4, 5, 6}
    assert credit_steps(run) == [3, 4, 5, 6]
    assert step_batches(run, [3]).keys() == {3}
    with pytest.raises(UserError, match="pruned from the log"):
        step_batches(run, [2])


def test_a_dry_run_removes_nothing_and_says_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_at(tmp_path / "run")
    files = {path for path in run.rglob("*") if path.is_file()}
    assert main(["prune", str(run), "--dry-run"]) == 0
    would = capsys.readouterr().out
    assert {path for path in run.rglob("*") if path.is_file()} >= files
    assert pruned_tokens(run / LEDGER) == {}
    assert main(["prune", str(run)]) == 0
    assert capsys.readouterr().out == would.replace("would remove", "removed")
    assert main(["prune", str(run)]) == 0
    assert "nothing to remove" in capsys.readouterr().out


@pytest.mark.parametrize("survivors", [0, 3, 7])
def test_killed_at_any_place_it_is_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, survivors: int
) -> None:
    run = run_at(tmp_path / "run")
    unlink: Callable[[Path], None] = Path.unlink
    removed = []

    def killed(path: Path) -> None:
        if len(removed) == survivors:
            raise KeyboardInterrupt
        removed.append(path)
        unlink(path)

    monkeypatch.setattr(Path, "unlink", killed)
    with pytest.raises(KeyboardInterrupt):
        prune(run, 0, False, quiet)
    monkeypatch.undo()
    assert log_problems(run) == []
    assert missing_segments(run / "trajectories") == []
    prune(run, 0, False, quiet)
    assert in_log(run) == {5, 6}
    assert log_problems(run) == []


def test_a_ledger_that_cannot_be_written_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_at(tmp_path / "run")

    def full(*_: object) -> None:
        raise RunError("the disk is full")

    monkeypatch.setattr(pruning, "mark_pruned", full)
    with pytest.raises(RunError, match="full"):
        prune(run, 0, False, quiet)
    assert in_log(run) == set(range(1, STEPS + 1))


def test_an_older_checkpoint_still_goes_on(tmp_path: Path) -> None:
    run = run_at(tmp_path / "run")
    prune(run, 0, False, quiet)
    assert needed_groups(run / LEDGER, 2) == {3, 4, 5, 6}
    resumed(run, 2)  # 3 and 4 are not in the log any more: their tickets are served again
    assert log_problems(run) == []


def test_a_run_that_goes_on_is_left_alone(tmp_path: Path) -> None:
    run = run_at(tmp_path / "run")
    training = RunDirectory.reopen(str(run))
    with pytest.raises(UserError, match="trained by another process"):
        prune(run, 0, False, quiet)
    training.release()
    assert in_log(run) == set(range(1, STEPS + 1))


def test_without_a_checkpoint_everything_is_needed(tmp_path: Path) -> None:
    run = run_at(tmp_path / "run")
    for folder in (run / "checkpoints").iterdir():
        (folder / "manifest.json").unlink(missing_ok=True)
        (folder / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="no whole checkpoint"):
        prune(run, 0, False, quiet)


def test_a_log_that_contradicts_the_ledger_is_not_touched(tmp_path: Path) -> None:
    run = run_at(tmp_path / "run")
    segments(run / "trajectories")[1].unlink()
    with pytest.raises(UserError, match="contradicts the ledger"):
        prune(run, 0, False, quiet)
    assert in_log(run) == {1, 3, 4, 5, 6}


@pytest.mark.parametrize("words", [["--keep-steps", "-1"], ["--keep-steps", "x"], ["--steps", "1"]])
def test_wrong_words_are_refused(tmp_path: Path, words: list[str]) -> None:
    run = run_at(tmp_path / "run")
    try:
        status = main(["prune", str(run), *words])
    except SystemExit as stopped:
        status = int(str(stopped.code))
    assert status == 2
    assert in_log(run) == set(range(1, STEPS + 1))
