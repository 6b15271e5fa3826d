"""`grpo-lambda eval` on real parts: Ray, vLLM, verifiers; interrupted, resumed, added up again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
from run_process import EPISODES, PROGRAM, QUICK, ROOT, finish, leftovers, start

from actors.verifiers import reasoning_gym
from common.record.trajectory_log import read_log
from common.record.turns import sampled_lengths
from deploy.eval.runner import logged, sample_seed

pytestmark = pytest.mark.long
PROBLEMS, SAMPLES = 8, 2
SUITE = """\
about: Sums of three one-digit numbers, as the tiny preset's.
source: reasoning_gym
reasoning_gym:
  task: chain_sum
  params: {min_terms: 3, max_terms: 3, min_digits: 1, max_digits: 1}
  size: 200
seed: 77
grader: {name: reasoning_gym}
samples: 2
temperature: 1.0
max_tokens: 24
license: Apache-2.0 (reasoning-gym)
"""


def command(folder: Path, *words: str, limit: int = PROBLEMS) -> list[str]:
    """One sequence at a time, so that there is time to interrupt."""
    return [
        *(sys.executable, *PROGRAM, "eval", "builtin:tiny-chain-sum"),
        *("--suite", str(folder / "sums.yaml"), "--out", str(folder / "out")),
        *("--limit", str(limit), *words),
        *("data.template=plain", "model.dtype=float32", "generator.threads=1"),
        *("generator.kv_cache_gib=0.25", "generator.max_concurrent_sequences=2"),
    ]


def run(arguments: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        arguments,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "sums.yaml").write_text(SUITE)
    return tmp_path


def accuracy(out: Path) -> float:
    """From the Parquet's completions alone, by the scorer again."""
    references = {
        batch.column("group_id")[0].as_py(): json.loads(batch.column("reference")[0].as_py())
        for batch in read_log(out / "trajectories")
    }
    rows = pq.read_table(out / "completions.parquet").to_pylist()
    samples = json.loads((out / "results.json").read_text())["samples"]
    assert [row["problem"] * samples + row["sample"] for row in rows] == sorted(references)
    marks = [
        reasoning_gym.score(row["completion"], references[number]).kind == "pass"
        for number, row in enumerate(rows)
    ]
    assert marks == [row["verdict"] == "pass" for row in rows]
    return sum(marks) / len(marks)


def test_an_interrupted_evaluation_is_resumed_to_the_numbers_of_a_whole_one(folder: Path) -> None:
    before, out, limit = set(psutil.pids()), folder / "out", 200
    process = run(command(folder, limit=limit))
    deadline = time.monotonic() + 240
    while len(logged(out / "trajectories")) < 5:
        assert process.poll() is None, finish(process, 10)
        assert time.monotonic() < deadline, "no sample was logged"
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGTERM)
    stopped = finish(process, 60)
    assert process.returncode == 143, stopped
    there = logged(out / "trajectories")
    assert 5 <= len(there) < limit * SAMPLES
    assert not (out / "results.json").exists()
    assert leftovers(before) == []

    output = finish(process := run(command(folder, limit=limit)), 280)
    assert process.returncode == 0, output
    assert f"{len(there)} of them in" in output
    numbers = [b.column("group_id")[0].as_py() for b in read_log(out / "trajectories")]
    assert sorted(numbers) == list(range(limit * SAMPLES))  # none lost, none twice
    results = json.loads((out / "results.json").read_text())
    assert results["metrics"]["avg@2"]["value"] == pytest.approx(accuracy(out))
    assert results["verdicts"].keys() <= {"pass", "fail"}

    # Seeds are the sample's own: another evaluation, of fewer problems, samples the same texts.
    again = command(folder, "--out", str(folder / "again"))
    output = finish(process := run(again), 280)
    assert process.returncode == 0, output
    assert leftovers(before) == []
    few = pq.read_table(folder / "again" / "completions.parquet").to_pylist()
    many = pq.read_table(out / "completions.parquet").to_pylist()[: PROBLEMS * SAMPLES]
    assert [row["completion"] for row in few] == [row["completion"] for row in many]
    assert sample_seed(0, 0, 0) != sample_seed(0, 0, 1)

    # Done: nothing starts. Other settings: refused.
    started = time.monotonic()
    output = finish(process := run(again), 60)
    assert process.returncode == 0, output
    assert "avg@2" in output
    assert "starting" not in output
    assert time.monotonic() - started < 60
    output = finish(process := run([*again, "--temperature", "0.5"]), 60)
    assert process.returncode == 2, output
    assert "sampling.temperature: 1.0 there, 0.5 now" in output


def test_two_suites_share_generators_and_have_graders_of_their_own(folder: Path) -> None:
    words = folder / "words.yaml"
    rule = "{name: format_rules, args: {patterns: ['.']}}"
    words.write_text(
        SUITE.replace("{name: reasoning_gym}", rule).replace("samples: 2", "samples: 1")
    )
    output = finish(process := run(command(folder, "--suite", str(words))), 280)
    assert process.returncode == 0, output
    assert output.count("starting 1 generator(s)") == 1
    found = {
        path.parent.name: json.loads(path.read_text()) for path in folder.rglob("results.json")
    }
    assert found.keys() == {"sums", "words"}
    assert found["sums"]["metrics"]["avg@2"]["value"] == pytest.approx(
        accuracy(folder / "out" / "sums")
    )
    assert found["words"]["metrics"]["avg@1"]["value"] == 1.0  # any text passes that rule


GAMES = """\
about: A number from 1 to 8, guessed in two turns.
source: file
path: secrets.jsonl
environment: {name: guess, max_turns: 2, turn_tokens: 6}
grader: {name: environment}
samples: 2
temperature: 1.0
max_tokens: 80
license: Apache-2.0 (this project)
"""


@pytest.mark.timeout(900)  # three runs
def test_a_checkpoint_of_a_run_in_an_environment_plays_episodes_of_a_suite(tmp_path: Path) -> None:
    process = start(*EPISODES, *QUICK, f"runs_dir={tmp_path}", "name=agent", "steps=2")
    output = finish(process, 280)
    assert process.returncode == 0, output
    secrets = [{"prompt": "Guess from 1 to 8.", "answer": str(n % 8 + 1)} for n in range(24)]
    (tmp_path / "secrets.jsonl").write_text("\n".join(map(json.dumps, secrets)))
    (tmp_path / "games.yaml").write_text(GAMES)
    template = [key for key in EPISODES if key.startswith("data.")]
    model, out = tmp_path / "agent" / "checkpoints" / "step-2", tmp_path / "out"
    words = [
        *(sys.executable, *PROGRAM, "eval", str(model), "--suite", str(tmp_path / "games.yaml")),
        *("--out", str(out), *template, "model.dtype=float32", "generator.threads=1"),
        "generator.kv_cache_gib=0.25",
    ]
    output = finish(process := run(words), 280)
    assert process.returncode == 0, output
    results = json.loads((out / "results.json").read_text())
    rows = pq.read_table(out / "completions.parquet").to_pylist()
    log = {batch.column("group_id")[0].as_py(): batch for batch in read_log(out / "trajectories")}
    assert sorted(log) == list(range(48))
    for number, row in enumerate(rows):
        said = log[number]
        assert row["length"] == sampled_lengths(said)[0] <= 12  # two turns of six
        assert (row["verdict"] == "pass") == (said.column("environment_reward")[0].as_py() == 1.0)
        if row["turns"] == 2:  # what was given between them is no length
            assert len(said.column("token_ids")[0]) > row["length"]
    assert {row["turns"] for row in rows} <= {1, 2}
    ends = {row["finish_reason"] for row in rows}
    assert ends <= {"stop", "turns"}
    right = [row["verdict"] == "pass" for row in rows]
    assert results["metrics"]["avg@2"]["value"] == pytest.approx(sum(right) / len(right))
    assert results["episodes"]["episode/ended/turns"] == sum(
        r["finish_reason"] == "turns" for r in rows
    )
    assert f"{sum(right) / len(right):.1%}".replace("%", " %") in output

    # Seeds are the sample's own, in every turn: the same episodes again, wherever they are played.
    words += ["--out", str(tmp_path / "again"), "environment.placement=actors"]
    words += ["environment.workers=2", "environment.num_cpus=0.5"]
    output = finish(process := run(words), 280)
    assert process.returncode == 0, output
    again = pq.read_table(tmp_path / "again" / "completions.parquet").to_pylist()
    assert [row["completion"] for row in again] == [row["completion"] for row in rows]
