"""The measure of credit on a real run: branches through vLLM, judged, and gone on with."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

import pyarrow.parquet
import pytest

from common.errors import UserError
from common.record.trajectory_log import read_log
from deploy.credit.launch import Options, measure
from deploy.launch import train

TINY = Path(__file__).resolve().parents[2] / "deploy" / "configs" / "tiny.yaml"
GUESS = TINY.with_name("tiny-guess.yaml")

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]


def test_the_segments_of_a_step_are_measured(tmp_path: Path) -> None:
    """The policy of version 2 has no checkpoint: it is made again from the log.

    Synchronous: else new weights may come inside of every completion, and no policy is theirs.
    """
    keys = {
        "generator.max_staleness": 0,
        "eval.every": 0,
        "eval.prompts": 8,
        "checkpoint.every": 3,
        "runs_dir": tmp_path,
    }
    train(TINY, recipe="grpo", name="run", steps=3, **keys)
    run = tmp_path / "run"
    wanted = {"run": run, "step": 3, "completions": 4, "continuations": 4, "points": 4}
    with pytest.raises(UserError, match="--samples 3 is not enough"):
        measure(Options(**wanted, samples=3))
    found = measure(Options(**wanted, recipes=["dr_grpo"]))
    assert found.unmeasured == 0
    assert set(found.rules) == set(found.directions) == {"this run", "dr_grpo"}
    for way in found.directions.values():
        assert way.missing or abs(way.cosine.value) <= 1
    folder = run / "measured" / "step-000003"
    rows = pyarrow.parquet.read_table(folder / "segments.parquet").to_pylist()
    completions = defaultdict(list)
    for row in rows:
        completions[row["group_id"], row["completion_index"]].append(row)
    assert len(completions) == 4
    for segments in completions.values():
        brought = sum(row["advantage"] for row in segments)
        assert brought == pytest.approx(segments[0]["reward"] - segments[0]["value"])
        assert all(row["continuations"] == 4 and row["value_error"] > 0 for row in segments)
    _check_log(run, folder, len(rows) * 4)
    logged = [batch.num_rows for batch in read_log(folder / "trajectories")]
    again = measure(Options(**wanted))
    assert again.rows[0]["value"] == found.rows[0]["value"]
    assert [batch.num_rows for batch in read_log(folder / "trajectories")] == logged
    with pytest.raises(UserError, match="other settings"):
        measure(Options(**{**wanted, "continuations": 2}))
    assert json.loads((folder / "results.json").read_text())["samples"] == len(rows) * 4


def test_the_turns_of_episodes_are_measured(tmp_path: Path) -> None:
    """Of an asynchronous run. Every continuation is an episode that goes on from one of the log."""
    train(GUESS, name="run", steps=3, runs_dir=tmp_path, **{"eval.every": 0})
    run = tmp_path / "run"
    wanted = {"run": run, "step": 3, "completions": 6, "continuations": 6, "points": 8}
    found = measure(Options(**wanted, at=("turns", "every:1")))
    assert found.unmeasured == 0
    episodes = {
        (row["group_id"], row["completion_index"]): row
        for batch in read_log(run / "trajectories")
        for row in batch.to_pylist()
    }
    for row in found.rows:
        turns = episodes[row["group_id"], row["completion_index"]]["turns"]
        assert any(turn["begin"] <= row["begin"] < turn["end"] for turn in turns)
    measured = {(row["group_id"], row["completion_index"]) for row in found.rows}
    for key in measured:
        own = [row for row in found.rows if (row["group_id"], row["completion_index"]) == key]
        brought = sum(row["advantage"] for row in own)
        assert brought == pytest.approx(own[0]["reward"] - own[0]["value"])
    _check_log(run, run / "measured" / "step-000003", len(found.rows) * 6)


def _check_log(run: Path, folder: Path, samples: int) -> None:
    """Every continuation goes on from its prefix, and was judged with it."""
    answers = {
        (row["prompt_id"], tuple(row["token_ids"]))
        for batch in read_log(run / "trajectories")
        for row in batch.to_pylist()
    }
    rows = [row for batch in read_log(folder / "trajectories") for row in batch.to_pylist()]
    assert len(rows) == samples
    for row in rows:
        length = row["guidance_length"]
        prefix = tuple(row["token_ids"][:length])
        assert any(prompt == row["prompt_id"] and ids[:length] == prefix for prompt, ids in answers)
        assert len(row["token_ids"]) > length and row["reward"] is not None
        assert len(row["text"]) > 0 or len(row["token_ids"]) == length + 1
