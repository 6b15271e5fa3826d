"""What a run and its plan make of an environment before anything is started."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from chat_templates import FAMILIES
from run_process import EPISODES, TINY

from common.errors import UserError
from deploy.command.presets import load
from deploy.models.tiny_model import build_tokenizer
from deploy.predict import data
from deploy.predict.data import see_data
from deploy.run import inputs

ROWS = [{"prompt": f"Buy {n} teas.", "answer": "tea", "wanted": "tea"} for n in range(30)]


def lines(
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
    environment: dict[str, Any],
    family: str = "hermes",
    more: Sequence[str] = (),
    **row: Any,
) -> list[str]:
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(each | row) for each in ROWS))
    monkeypatch.setattr(data, "tokenizer_here", lambda *model: FAMILIES[family].tokenizer())
    keys = {"data.path": folder / "rows.jsonl", "eval.prompts": 4, "verifier.rules": "[]"}
    overrides = [f"{key}={value}" for key, value in keys.items()]
    overrides += ["model.path=x", "model.max_length=1200", f"environment={environment}", *more]
    return see_data(load(None, overrides)).lines


def test_a_plan_names_the_tools_and_shows_that_prompts_tell_of_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    said = lines(monkeypatch, tmp_path, {"name": "tool_environments:Shop"})
    assert "tools: break_down, buy, price, wait" in said
    (read,) = (line for line in said if line.startswith("the policy reads"))
    assert all(f'"name": "{tool}"' in read for tool in ("break_down", "buy", "price", "wait"))
    assert any("hermes" in line for line in said)  # the parser of calls


def test_a_plan_says_that_an_environment_does_not_repeat_itself(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    args = {"name": "hostile_environments:Diced", "args": {"unseeded": "true"}}
    said = lines(monkeypatch, tmp_path, args, "chatml")
    assert any("is not the same twice" in line for line in said)


def test_a_template_that_cannot_be_appended_to_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="cannot be appended to.*set environment.thoughts=keep"):
        lines(monkeypatch, tmp_path, {"name": "tool_environments:Shop"}, "forgets thoughts")


def test_a_task_that_the_environment_cannot_begin_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="cannot begin an episode of the first task: reset: KeyErr"):
        environment = {"name": "hostile_environments:Hostile"}
        lines(monkeypatch, tmp_path, environment, do="raise", at="reset")


def test_a_run_says_at_its_start_what_its_template_does(tmp_path: Path) -> None:
    """And is refused there by a template that cannot be appended to."""
    build_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "model/config.json").write_text('{"model_type": "llama"}')
    config, said = load(TINY, list(EPISODES)), list[str]()
    inputs.find_prompts(config, str(tmp_path / "model"), said.append)
    assert any("the chat template marks roles with plain words" in line for line in said)
    config.data.template, config.data.chat_template = "plain", None
    with pytest.raises(UserError, match="needs a chat template"):
        inputs.find_prompts(config, str(tmp_path / "model"), said.append)


def test_a_plan_shows_what_a_scorer_reads_and_refuses_a_context_that_no_row_has(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As a run does at its start."""
    shop = {"name": "tool_environments:Shop"}
    advantage = "algorithm.advantage={kind: evidence, scorer: reference, context: %s}"
    said = lines(monkeypatch, tmp_path, shop, more=[advantage % "answer"])
    (read,) = (line for line in said if line.startswith("the scorer reads"))
    assert "The right answer is:\\ntea" in read
    said = lines(monkeypatch, tmp_path, shop, more=[advantage % "feedback"])
    (read,) = (line for line in said if line.startswith("the scorer reads"))
    assert "[what is known after sampling]" in read
    for context, columns in (
        ("answer", "set data.answer_column,"),
        ("solution", "set data.solution_column, or"),
    ):
        with pytest.raises(UserError, match=columns):
            lines(monkeypatch, tmp_path, shop, more=[advantage % context], answer=None)
