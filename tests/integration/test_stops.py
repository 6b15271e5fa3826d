"""Completions that end at `generator.stop`, on a real engine."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from engine_beside import engine_beside
from run_process import run_python

from deploy.models.resolve import resolve_model


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    script = Path(__file__).with_name("stops_of_an_engine.py")
    result = run_python(str(script), timeout_s=240)
    assert result.returncode == 0, result.stderr
    found: list[dict[str, Any]] = json.loads(result.stdout.splitlines()[-1])
    return found


def met(row: dict[str, Any]) -> bool:
    """Whether the free completion holds a stop of the row."""
    return any(
        stop in (row["free_text"] if isinstance(stop, str) else row["free"]) for stop in row["stop"]
    )


def test_a_stop_is_a_prefix_of_the_free_completion_with_its_logprobs(
    rows: list[dict[str, Any]],
) -> None:
    kinds = {str(row["stop"]) for row in rows if met(row) and row["stopped"] != row["free"]}
    assert len(kinds) >= 3, "the seeds never met a stop"
    for row in rows:
        length = len(row["stopped"])
        assert row["stopped"] == row["free"][:length]
        assert row["logprobs"] == pytest.approx(row["free_logprobs"][:length], abs=1e-5)
        assert row["logprobs"] == pytest.approx(row["scored"], abs=1e-4)
        assert met(row) or row["stopped"] == row["free"]


def test_the_tokens_of_a_stop_stay_and_its_text_goes(rows: list[dict[str, Any]]) -> None:
    for row in filter(met, rows):
        assert row["finish_reason"] == "stop"
        texts = [stop for stop in row["stop"] if isinstance(stop, str)]
        if texts:
            (said,) = {text for text in texts if text in row["tokens_text"]}
            assert not any(text in row["tokens_text"][:-1] for text in texts)
            assert row["text"] + said == row["tokens_text"]
        else:
            assert row["stopped"][-1] == row["stop"][0]
            assert row["stop"][0] not in row["stopped"][:-1]
            assert "2" not in row["text"]


def test_every_end_that_generation_config_names_ends_a_completion(tmp_path: Path) -> None:
    """Instruction-tuned models end a turn by a token that only this file knows of: Gemma's 106."""
    plain, several = Path(resolve_model("builtin:tiny-chain-sum")), tmp_path / "model"
    prompts = [[5, 6, 7], [8, 9, 5], [6, 6, 6]]
    with engine_beside(plain, 64) as engine:
        free = [tokens for tokens, _ in engine.sample(prompts, 1.0, 24)]
    end = free[0][2]
    shutil.copytree(plain, several)
    named = json.loads((plain / "config.json").read_text())["eos_token_id"]
    (several / "generation_config.json").write_text(json.dumps({"eos_token_id": [named, end]}))
    with engine_beside(several, 64) as engine:
        ended = [tokens for tokens, _ in engine.sample(prompts, 1.0, 24)]
    cut = [tokens[: tokens.index(end) + 1] if end in tokens else tokens for tokens in free]
    assert ended == cut != free
