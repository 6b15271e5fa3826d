"""What a configuration leaves to the data: their source and their rule; and what `plan` shows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from common.config.load import load_config
from common.config.sections import Config, VerifierSpec
from common.errors import UserError
from deploy.cli import main
from deploy.command.presets import CONFIGS
from deploy.run.settled import settled

TINY = CONFIGS / "tiny.yaml"


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def verl(count: int = 20) -> list[dict[str, Any]]:
    return [
        {
            "data_source": "openai/gsm8k",
            "prompt": [{"role": "user", "content": f"What is {n} + {n}?"}],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": str(2 * n)},
            "extra_info": {"index": n},
        }
        for n in range(count)
    ]


def trl(count: int = 20) -> list[dict[str, Any]]:
    return [
        {
            "prompt": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": f"What is {n} + {n}?"},
            ],
            "solution": rf"So \boxed{{{2 * n}}}.",
        }
        for n in range(count)
    ]


LETTERS = [{"question": f"{n}?\nA) 1\nB) 2", "answer": "AB"[n % 2]} for n in range(20)]
PROGRAMS = [{"question": f"{n}?", "tests": {"kind": "script", "script": "1"}} for n in range(20)]
ESSAYS = [{"instruction": f"Tell {n}", "output": "It was a dark night. " * 20} for n in range(20)]
SENTENCES = [
    {"question": f"Why {n}?", "answer": "Because the sun is far away from the earth and hot."}
    for n in range(20)
]
HIDDEN = [{"question": f"{n}?", "choices": ["x", "y"], "answer": n % 2} for n in range(20)]
UNSEEN = [
    {"question": f"{n}?", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answer": "A"}
    for n in range(20)
]
SHOWN = [{"question": f"{n}? A) x B) y", "choices": ["x", "y"], "answer": "B"} for n in range(20)]
DICTIONARIES = [{"question": f"{n}?", "answer": {"a": n}} for n in range(20)]


def loaded(*keys: str) -> Config:
    return load_config([TINY], [*keys, "eval.prompts=4"], CONFIGS / "recipes")


@pytest.mark.parametrize(
    ("name", "rows", "rule"),
    [
        ("a.parquet", verl(), "math_answer"),
        ("a.jsonl", trl(), "math_answer"),
        ("a.parquet", trl(), "math_answer"),
        ("a.jsonl", LETTERS, "choice"),
        ("a.jsonl", PROGRAMS, "code_tests"),
        ("a.jsonl", SHOWN, "choice"),
        ("a.jsonl", [*LETTERS[:1], *verl()], "math_answer"),
    ],
)
def test_a_path_alone_decides_source_and_rule(
    tmp_path: Path, name: str, rows: list[dict[str, Any]], rule: str
) -> None:
    path, said = write(tmp_path / name, rows), []
    config = settled(loaded(f"data.path={path}"), said.append)
    assert config.data.source == "file"
    assert config.verifier.rules == [VerifierSpec(name=rule)]
    (line,) = said
    assert line.startswith(f"{path} (question in ") and f"is judged by {rule}" in line
    assert settled(config, said.append) == config and len(said) == 1


@pytest.mark.parametrize("rows", [ESSAYS, SENTENCES, DICTIONARIES, HIDDEN, UNSEEN])
def test_where_no_rule_fits_none_is_taken(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    path = write(tmp_path / "a.jsonl", rows)
    with pytest.raises(UserError, match=r"no built-in rule fits.*verifier\.rules"):
        settled(loaded(f"data.path={path}"), print)
    own = settled(loaded(f"data.path={path}", "verifier.rules=[{name: my:rule}]"), print)
    assert own.verifier.rules == [VerifierSpec(name="my:rule")]


def test_the_preset_itself_is_judged_by_its_task() -> None:
    config = settled(loaded(), print)
    assert (config.data.source, config.verifier.rules[0].name) == ("reasoning_gym",) * 2


def test_several_data_sets_get_a_rule_each(tmp_path: Path) -> None:
    sums, letters = write(tmp_path / "s.jsonl", trl()), write(tmp_path / "l.jsonl", LETTERS)
    sets = (
        f"data.sources=[{{name: sums, path: {sums}}}, {{name: letters, path: {letters}}},"
        f"{{name: more, path: {letters}}}, {{name: drawn}}]"
    )
    config = settled(loaded(sets), print)
    assert config.verifier.rules == [
        VerifierSpec(name="math_answer", sources=["sums"]),
        VerifierSpec(name="choice", sources=["letters", "more"]),
        VerifierSpec(name="reasoning_gym", sources=["drawn"]),
    ]
    kinds = ["file", "file", "file", "reasoning_gym"]
    assert [one.source for one in config.data.sources] == kinds


def test_data_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        settled(loaded(f"data.path={tmp_path}/none.jsonl"), print)
    path = write(tmp_path / "a.jsonl", [{"x": 1}])
    with pytest.raises(UserError, match="(?s)no column with the question.*no row of .* can be"):
        settled(loaded(f"data.path={path}"), print)


def plan(capsys: pytest.CaptureFixture[str], *keys: str) -> tuple[int, str]:
    status = main(["plan", "--config", str(TINY), "eval.prompts=4", *keys])
    printed = capsys.readouterr()
    return status, printed.err or printed.out


@pytest.mark.parametrize(
    ("name", "rows", "reads"),
    [
        ("a.parquet", verl(), "'What is 0 + 0?'"),
        ("a.jsonl", trl(), r"'Be brief.\n\nWhat is 0 + 0?'"),
    ],
)
def test_a_plan_shows_what_policy_and_verifiers_get(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    rows: list[dict[str, Any]],
    reads: str,
) -> None:
    path = write(tmp_path / name, rows)
    status, text = plan(capsys, f"data.path={path}", "data.order=sequential")
    assert status == 0
    assert "  source: file  # follows from data.path" in text
    assert "  rules:  # what fits the data\n  - name: math_answer\n" in text
    assert "16 questions to train on, 4 held out; 0 of 20 rows cannot be used" in text
    assert f"tokens: {reads}\n" in text
    assert '\n  prompt: "What is 0 + 0?"\n' in text
    assert "\n  answer: " in text


def test_a_plan_counts_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": f"What is 1 + {n}?", "answer": n + 1} for n in range(40)]
    rows[3]["answer"], rows[4]["answer"], rows[5]["answer"] = "", r"\frac{1}{2", r"\frac{1}{3"
    rows += [rows[7], {"prompt": "What is 1 + 9?", "answer": 11}]
    rows += [{"prompt": "x" * 200, "answer": 1}]  # among those that would be held out
    path = write(tmp_path / "a.jsonl", rows)
    status, text = plan(capsys, f"data.path={path}")
    assert status == 2 and "4 of 43 rows cannot be used" in text
    status, text = plan(capsys, f"data.path={path}", "data.max_bad_rows=0.2")
    assert status == 0
    for line in (
        "35 questions to train on, 4 held out; 4 of 43 rows cannot be used",
        f"  2 rows: {path}, line 5: the stored answer",
        f"  {path}, line 4: column 'answer' has no answer: ''",
        f"  {path}, line 43: the prompt has 200 tokens and at most 104 fit",
        "  2 rows repeat the question of another row",
        "  1 questions are stored with more than one answer",
        "  tokens of a prompt: 50 % have at most 15, 90 % have at most 15, 99 % have at most 15, ",
    ):
        assert line in text, (line, text)


def test_a_plan_shows_special_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "a.jsonl", trl())
    keys = ("data.template=plain", r"data.plain_template={prompt}<|end|>x")
    _, text = plan(capsys, f"data.path={path}", *keys)
    assert "?<|end|>x'\n" in text


def test_a_plan_without_a_tokenizer_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    status, text = plan(capsys, "model.path=nobody/nothing")
    assert status == 0
    assert "not read: the tokenizer of nobody/nothing is not on this machine" in text
