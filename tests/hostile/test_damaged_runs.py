"""Files of a run that are damaged, and machines that lack something: advice, at once."""

from __future__ import annotations

import os
import random
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
from inspector_runs import sums_run

from actors.data.schemas import _number
from common.config.load import dump_config, load_config
from common.config.sections import Config
from common.errors import UserError
from common.record.credit_log import credit_path, read_credit, read_group_credit
from common.record.ledger import Ledger, check_ledger
from common.record.metrics import JsonlSink, read_metrics
from common.record.trajectory_log import missing_segments, read_segment
from deploy.command.presets import RECIPES, load
from deploy.command.trust import check_code, code_named
from deploy.inspector.run_data import RunData
from deploy.models.resolve import resolve_model
from deploy.run.directory import LEDGER, RunDirectory
from deploy.run.inputs import _look_at

CLI = [sys.executable, "-m", "deploy.cli"]
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run that has ended, its one segment with a Parquet twin."""
    open_one, folder = tmp_path / "open", tmp_path / "run"
    sums_run(open_one, steps=2, per_step=2)
    shutil.copytree(open_one, folder, ignore=shutil.ignore_patterns(f"{LEDGER}*"))
    with (
        closing(sqlite3.connect(open_one / LEDGER)) as source,
        closing(sqlite3.connect(folder / LEDGER)) as target,
    ):
        source.backup(target)
        target.execute("PRAGMA journal_mode = DELETE")
    (segment,) = (folder / "trajectories").glob("*.arrow")
    table = pa.Table.from_batches(read_segment(segment))
    pa.parquet.write_table(table, segment.with_suffix(".parquet"))
    return folder


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def blank(path: Path) -> None:
    path.write_bytes(b"")


def garbage(path: Path) -> None:
    path.write_bytes(random.Random(0).randbytes(4096))


def spotted(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 3 : len(content) // 3 + 2000] = random.Random(1).randbytes(2000)
    path.write_bytes(content)


@pytest.mark.parametrize("spoil", [cut, blank, garbage, spotted])
def test_a_damaged_ledger_is_found_before_anything_starts(
    run: Path, spoil: Callable[[Path], None]
) -> None:
    check_ledger(run / LEDGER, 0)
    spoil(run / LEDGER)
    with pytest.raises(UserError, match=r"damaged|cannot be read|not a database"):
        _look_at(RunDirectory(run), 0, print)
    if spoil in (cut, garbage):  # an empty file is a new ledger, and the facts may be whole
        with pytest.raises(UserError, match="No resume= can go on"):
            Ledger(run / LEDGER, "synthetic")


@pytest.mark.parametrize(
    "text", [b"\xff\xfe\n", b"{\n", b"[1]\n", b'{"step": "x"}\n', b"[" * 9999 + b"\n"]
)
def test_a_damaged_line_of_the_metrics_is_named(run: Path, text: bytes) -> None:
    path = run / "metrics.jsonl"
    whole = read_metrics(path)
    path.write_bytes(path.read_bytes() + text + b'{"step": 3}\n')
    for reading in (lambda: read_metrics(path), lambda: JsonlSink(path, 2), lambda: RunData(run)):
        with pytest.raises(UserError, match=f"line {len(whole) + 1} is no record"):
            reading()


@pytest.mark.parametrize("spoil", [cut, blank, garbage, spotted])
def test_a_damaged_credit_file_is_named(run: Path, spoil: Callable[[Path], None]) -> None:
    assert read_credit(run, 1).num_rows
    spoil(credit_path(run, 1))
    with pytest.raises(UserError, match="step-000001.arrow"):
        read_credit(run, 1)
    with pytest.raises(UserError, match="step-000001.arrow"):
        for group in range(8):
            read_group_credit(run, 1, group)


@pytest.mark.parametrize("spoil", [cut, blank, garbage])
def test_a_damaged_parquet_twin_is_named(run: Path, spoil: Callable[[Path], None]) -> None:
    (twin,) = (run / "trajectories").glob("*.parquet")
    spoil(twin)
    with pytest.raises(UserError, match=r"parquet is damaged.*Remove it"):
        RunData(run)
    twin.unlink()
    assert RunData(run).facts()["groups"]


def test_a_segment_that_is_gone_is_told(run: Path) -> None:
    folder = run / "trajectories"
    assert missing_segments(folder) == []
    (folder / "segment-000000.arrow").unlink()
    assert missing_segments(folder) == ["segment-000000.arrow"]
    told: list[str] = []
    _look_at(RunDirectory(run), 0, told.append)
    assert any("segment-000000.arrow of the trajectory log is gone" in line for line in told)


def test_a_configuration_that_was_edited_by_hand_is_told(tmp_path: Path) -> None:
    config = load(None, [f"runs_dir={tmp_path}", "name=run"])
    directory = RunDirectory.create(config)
    assert not directory.config_was_edited()
    path = directory.path / "config.yaml"
    path.write_text(path.read_text().replace("group_size: ", "group_size: 1"))
    assert directory.config_was_edited()
    directory.release()
    assert not directory.path.exists()


def test_a_home_that_cannot_be_written_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "home").write_text("a file")
    monkeypatch.delenv("GRPO_LAMBDA_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    with pytest.raises(UserError, match="GRPO_LAMBDA_CACHE"):
        resolve_model("builtin:tiny-chain-sum")


def test_a_difficulty_of_400_digits_is_told() -> None:
    with pytest.raises(UserError, match="400 digits"):
        _number({"level": 10**399}, "level", "row 1")


@pytest.mark.parametrize(
    "words",
    [
        ("recipes",),
        ("plan", "--config", "deploy/configs/tiny.yaml"),
        ("inspect", "RUN", "--ledger"),
    ],
)
def test_verbs_end_quietly_when_nobody_reads_and_say_when_there_is_no_room(
    run: Path, words: tuple[str, ...]
) -> None:
    command = [*CLI, *(str(run) if word == "RUN" else word for word in words)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    reader, writer = os.pipe()
    os.close(reader)
    for stdout, status, said in (
        (writer, 141, ""),
        (os.open("/dev/full", os.O_WRONLY), 1, "No space"),
    ):
        done = subprocess.run(
            command, cwd=ROOT, env=environment, stdout=stdout, stderr=subprocess.PIPE,
            text=True, timeout=120, check=False,
        )  # fmt: skip
        os.close(stdout)
        assert done.returncode == status, done.stderr
        assert said in done.stderr
        assert "Traceback" not in done.stderr
        assert "Exception ignored" not in done.stderr
        assert bool(done.stderr.strip()) == bool(said)


OWN = "verifier.rules=[{name: 'somewhere_sent:rule'}]"


def sent(tmp_path: Path, *words: str) -> Path:
    config = load_config([ROOT / "deploy/configs/tiny.yaml"], list(words), RECIPES)
    folder = tmp_path / "sent"
    folder.mkdir()
    (folder / "config.yaml").write_text(dump_config(config))
    return folder


def test_a_command_that_a_sent_run_names_does_not_run_unless_it_is_wanted(tmp_path: Path) -> None:
    """A step of it is replayed without: it needs no environment."""
    command = "environment.command=[python,agent.py]"
    folder = sent(tmp_path, command, "data.template=chat")
    config = load_config([folder / "config.yaml"], [], resolved=True)
    for words in ([], ["environment.command=[python,other.py]"]):
        with pytest.raises(UserError, match=r"environment\.command=python agent\.py.*--trust-code"):
            check_code(config, folder, words)
    check_code(config, folder, [command])
    check_code(config, folder, [], ignored=("environment",))


@pytest.mark.parametrize(
    ("word", "named"),
    [
        (OWN, "verifier.rules.name=somewhere_sent:rule"),
        ("algorithm.credit.kind=somewhere_sent:rule", "algorithm.credit.kind=somewhere_sent:rule"),
        ("environment.name=somewhere_sent:Game", "environment.name=somewhere_sent:Game"),
        ("model.trust_remote_code=true", "model.trust_remote_code=true"),
    ],
)
def test_code_that_a_sent_run_names_does_not_run_unless_it_is_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, word: str, named: str
) -> None:
    (tmp_path / "somewhere_sent.py").write_text("open('ran', 'w')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    try:
        folder = sent(tmp_path, word)
    except UserError as error:  # other keys go with it
        pytest.skip(str(error))
    config = load_config([folder / "config.yaml"], [], resolved=True)
    assert named in [f"{key}={value}" for key, value in code_named(config)]
    with pytest.raises(UserError, match="--trust-code"):
        load(None, [f"resume={folder}"])
    with pytest.raises(UserError, match="--trust-code"):
        check_code(config, folder, ["recipe=grpo"])
    check_code(config, folder, [word])
    assert not (tmp_path / "ran").exists()


def test_the_presets_name_no_code() -> None:
    for path in (ROOT / "deploy" / "configs").glob("*.yaml"):
        assert code_named(load(path, [])) == [], path


@pytest.mark.parametrize(
    "word",
    [
        "checkpoint.mirror=s3://AKIA:sEcReT@bucket/folder",
        "checkpoint.mirror=s3://bucket/folder?secret_key=sEcReT",
        "data.path=https://user:sEcReT@example.org/train.jsonl",
        "verifier.rules=[{name: 'my:rule', args: {api_key: sEcReT}}]",
        "verifier.rules=[{name: 'my:rule', args: {urls: ['http://a:sEcReT@host']}}]",
    ],
)
def test_no_password_gets_into_a_configuration(word: str) -> None:
    with pytest.raises(UserError, match="holds a password or a key") as caught:
        load_config([], ["model.path=builtin:tiny-chain-sum", word])
    assert "sEcReT" not in str(caught.value)


@pytest.mark.parametrize(
    "word",
    ["checkpoint.mirror=s3://bucket/folder@2", "data.plain_template='https://a b:c @d {prompt}'"],
)
def test_what_is_no_password_is_taken(word: str) -> None:
    assert isinstance(replace(load_config([], ["model.path=builtin:tiny-chain-sum", word])), Config)
