"""Episodes of a log played again: real environments, and the log in the policy's place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from episode_runs import GROUP, configured, made
from source_tree import ROOT

from common.config.load import dump_config
from common.record.trajectory_log import TrajectoryLog
from deploy.cli import main
from deploy.command.presets import load


def changed(run: Path, other: Path, change: Any, index: int = 0) -> None:
    """`other` is `run` with a row of the log changed."""
    batch = pa.ipc.open_stream(run / "trajectories/segment-000000.arrow").read_next_batch()
    rows = batch.to_pylist()
    change(rows[index])
    other.mkdir(exist_ok=True)
    (other / "config.yaml").write_text((run / "config.yaml").read_text())
    log = TrajectoryLog(other / "trajectories", batch.schema)
    log.append(pa.RecordBatch.from_pylist(rows, schema=batch.schema))
    log.close()


def replayed(run: Path, episode: str, capsys: pytest.CaptureFixture[str], *more: str):
    capsys.readouterr()
    status = main(["replay", str(run), "--episode", episode, *more])
    found = capsys.readouterr()
    return status, found.out + found.err


@pytest.fixture(scope="module")
def guessed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A secret sought four times, with and without a number, up to the limit of turns."""
    said = [["4", "5", "6"], ["1", "1", "1"], ["no", "8", "8"], ["1", "2", "3"]]
    return made(tmp_path_factory.mktemp("runs") / "run", configured("guess"), said)


@pytest.mark.parametrize("index", range(4))
def test_an_episode_that_repeats_itself_is_the_same(
    guessed: Path, index: int, capsys: pytest.CaptureFixture[str]
) -> None:
    status, output = replayed(guessed, f"{GROUP}/{index}", capsys)
    assert status == 0, output
    assert f"episode {GROUP}/{index} of guess, " in output
    assert "all observations, rewards and states are the same" in output


@pytest.mark.parametrize(
    ("column", "change", "turn", "what"),
    [
        ("token_ids", lambda row: row["token_ids"].__setitem__(row["turns"][1]["end"] + 3, 65),
         2, "observation"),
        ("turns", lambda row: row["turns"][0].__setitem__("reward", 0.25), 1, "reward"),
        ("turns", lambda row: row["turns"][1].__setitem__("state", "3..3"), 2, "state"),
        ("finish_reason", lambda row: row.__setitem__("finish_reason", "context"), 3, "end"),
    ],
)  # fmt: skip
def test_the_first_difference_is_named(
    guessed: Path, tmp_path: Path, column: str, change: Any, turn: int, what: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    changed(guessed, tmp_path, change, 1)
    status, output = replayed(tmp_path, f"{GROUP}/1", capsys)
    assert status == 1
    assert f"it differs from the log behind turn {turn}: the {what}" in output, output
    assert replayed(tmp_path, f"{GROUP}/0", capsys)[0] == 0


def test_another_seed_is_another_secret(
    guessed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a synchronous run; in any other the secret follows from the prompt."""
    config = configured("guess", "generator.max_staleness=0")
    made(tmp_path / "run", config, [["4", "4", "4"]])
    text = (tmp_path / "run/config.yaml").read_text()
    assert replayed(tmp_path / "run", f"{GROUP}/0", capsys)[0] == 0
    outcomes = set[int]()
    for seed in range(1, 9):
        (tmp_path / "run/config.yaml").write_text(text.replace("\nseed: 0", f"\nseed: {seed}"))
        outcomes.add(replayed(tmp_path / "run", f"{GROUP}/0", capsys)[0])
        (tmp_path / "config.yaml").write_text(
            (guessed / "config.yaml").read_text().replace("\nseed: 0", f"\nseed: {seed}")
        )
    assert 1 in outcomes
    (tmp_path / "trajectories").symlink_to(guessed / "trajectories")
    assert replayed(tmp_path, f"{GROUP}/0", capsys)[0] == 0


@pytest.mark.parametrize(("late", "where"), [(0, "at the beginning"), (2, "behind turn 2")])
def test_an_environment_that_does_not_repeat_itself_is_found(
    tmp_path: Path, late: int, where: str, capsys: pytest.CaptureFixture[str]
) -> None:
    name, args = "hostile_environments:Diced", f"{{unseeded: {late == 0}, late: {late}}}"
    config = configured(name, f"environment.args={args}")
    run = made(tmp_path / "run", config, [["1", "2", "3"]])
    status, output = replayed(run, f"{GROUP}/0", capsys, "--trust-code")
    assert status == 1
    assert f"it differs from the log {where}: the observation" in output, output


@pytest.mark.parametrize("at", ["reset", "step", "reward"])
def test_a_failure_is_repeated_too(
    tmp_path: Path, at: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = configured("hostile_environments:Hostile")
    task = {"do": "raise", "at": at}
    run = made(tmp_path / "run", config, [["1", "2", "3"]], task)
    status, output = replayed(run, f"{GROUP}/0", capsys, "--trust-code")
    assert status == 0, output
    changed(run, tmp_path / "mended", lambda row: row.update(reference='{"at": "never"}'))
    status, output = replayed(tmp_path / "mended", f"{GROUP}/0", capsys, "--trust-code")
    assert status == 1
    assert f"error ({at}: KeyError: 'shelf'" in output


def test_what_cannot_be_played_again_is_refused(
    guessed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for episode, reason in (
        ("8/0", "has 1 from 7 to 7, and not this one"),
        (f"{GROUP}/9", "has the completions 0, 1, 2, 3"),
        ("seven", "as 12/3"),
    ):
        status, output = replayed(guessed, episode, capsys)
        assert (status, reason in output) == (2, True), output
    status, output = replayed(guessed, f"{GROUP}/0", capsys, "recipe=grpo")
    assert (status, "another rule goes with --step" in output) == (2, True)
    config = load(ROOT / "deploy/configs/tiny.yaml", [])
    (tmp_path / "config.yaml").write_text(dump_config(config))
    status, output = replayed(tmp_path, f"{GROUP}/0", capsys)
    assert (status, "named no environment" in output) == (2, True)


@pytest.mark.parametrize(
    ("name", "args"),
    [("gone_module:Game", "{}"), ("mcp", "{command: [gone-server, --port, '1']}")],
)
def test_code_runs_only_where_it_is_trusted(
    tmp_path: Path, name: str, args: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A module of the run's, or a command; then it is said that it is gone."""
    guess = made(tmp_path / "run", configured("guess"), [["1"] * 3])
    config = configured("guess")
    config.environment.name = name
    config.environment.args = {} if args == "{}" else {"command": ["gone-server", "--port", "1"]}
    (guess / "config.yaml").write_text(dump_config(config))
    status, output = replayed(guess, f"{GROUP}/0", capsys)
    assert (status, "--trust-code" in output) == (2, True), output
    status, output = replayed(guess, f"{GROUP}/0", capsys, "--trust-code")
    assert (status, "gone" in output) == (2, True), output
