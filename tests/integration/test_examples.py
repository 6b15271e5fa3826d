"""The examples as a person runs them, and `train` as a notebook calls it: real runs."""

from __future__ import annotations

import asyncio
import math
import subprocess
import sys
from pathlib import Path

import pytest
from run_process import ROOT, TINY, finish, start

from common.record.metrics import read_metrics

pytestmark = pytest.mark.long
SHORT = ("steps=3", "eval.every=0", "eval.prompts=16", "checkpoint.every=0")


def steps_of(folder: Path, name: str) -> list[dict[str, float]]:
    return [r for r in read_metrics(folder / name / "metrics.jsonl") if "grad_norm" in r]


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        (
            "verifier",
            (
                "verifier.rules=[{name: deploy.examples.verifier:right_and_short, "
                "args: {limit: 12}}]",
            ),
        ),
        ("credit", ("recipe=grpo", "algorithm.credit.kind=deploy.examples.credit:by_entropy")),
        (
            "advantage",
            ("recipe=grpo", "algorithm.baseline.kind=deploy.examples.advantage:by_rank"),
        ),
        (
            "data",
            (
                "data.source=file",
                "data.prompt_column=question",
                "data.answer_column=product",
                "verifier.rules=[{name: math_answer, args: {extract: last_number}}]",
            ),
        ),
    ],
)
def test_an_example_trains(name: str, overrides: tuple[str, ...], tmp_path: Path) -> None:
    if name == "data":
        data = tmp_path / "products.jsonl"
        script = ROOT / "deploy" / "examples" / "data_set.py"
        subprocess.run([sys.executable, str(script), str(data)], check=True, timeout=60)
        overrides += (f"data.path={data}",)
    process = start(f"runs_dir={tmp_path}", f"name={name}", *SHORT, *overrides)
    output = finish(process, 280)
    assert process.returncode == 0, output
    steps = steps_of(tmp_path, name)
    assert [record["step"] for record in steps] == [1, 2, 3]
    assert all(math.isfinite(record["grad_norm"]) for record in steps)
    if name == "advantage":
        assert all(0 <= record["advantage/tied"] <= 1 for record in steps)
    if name == "credit":
        assert all("entropy/mean" in record for record in steps)
        # Entropy over the completion's mean entropy is 1 on average over its tokens.
        assert all(0.9 < record["credit/mean_weight"] < 1.1 for record in steps)


def test_a_notebook_trains(tmp_path: Path) -> None:
    """`train` inside a running event loop, whose thread it does not take signals in."""
    from deploy.launch import train

    async def cell() -> None:
        keys = {"eval.every": 0, "eval.prompts": 16, "checkpoint.every": 0, "batch.group_size": 4}
        result = train(TINY, steps=3, runs_dir=str(tmp_path), name="note", **keys)
        table = result.metrics()
        assert table.column("step").to_pylist()[-1] == 3
        assert result.path == tmp_path / "note"

    asyncio.run(cell())
    assert len(steps_of(tmp_path, "note")) == 3
