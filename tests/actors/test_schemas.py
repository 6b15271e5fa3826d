"""Data sets in the schemas that others write, and templates tried for what they do."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from byte_tokenizers import CHAT, byte_tokenizer

from actors.data.account import counted
from actors.data.chat import Template
from actors.data.prompts import PromptSource, build_prompt_source
from actors.data.schemas import Columns, to_row
from actors.verifiers import math_answer
from common.config.sections import DataConfig, VerifierSpec
from common.errors import UserError

VERL = {
    "data_source": "openai/gsm8k",
    "prompt": [{"role": "user", "content": "What is 1 + 2?"}],
    "reward_model": {"style": "rule", "ground_truth": "3"},
    "extra_info": {"split": "train", "index": 7},
}
TRL = {
    "prompt": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is 1 + 2?"},
    ],
    "solution": r"We add. So it is \boxed{3}.",
}
MESSAGES = {
    "messages": [
        {"role": "user", "content": "What is 1 + 1?"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "What is 1 + 2?"},
        {"role": "assistant", "content": "The answer is 3."},
    ]
}
SHAREGPT = {"conversations": [{"from": "human", "value": "What is 1 + 2?"}], "target": 3}


@pytest.mark.parametrize(
    ("record", "turns", "found"),
    [
        (VERL, 1, "question in prompt, answer in reward_model.ground_truth"),
        (TRL, 2, "question in prompt, answer in solution"),
        (MESSAGES, 3, "question in messages, answer in the last turn of the assistant"),
        (SHAREGPT, 1, "question in conversations, answer in target"),
        (
            {"prompt": "What is 1 + 2?", "solution": "3"},
            1,
            "question in prompt, answer in solution",
        ),
        (
            {"problem": "What is 1 + 2?", "answer": 3.0},
            1,
            "question in problem, answer in answer",
        ),
    ],
)
def test_schemas_load_as_they_are(record: dict[str, Any], turns: int, found: str) -> None:
    row = to_row(Columns(), "row 1", record)
    assert (row.question, len(row.conversation), row.schema) == ("What is 1 + 2?", turns, found)
    reference = json.loads(row.reference)
    math_answer.check_reference(reference)
    assert math_answer.score(r"\boxed{3}", reference).kind == "pass"
    assert math_answer.score(r"\boxed{4}", reference).kind == "fail"
    others = {name: value for name, value in record.items() if name not in row.schema}
    assert others.items() <= reference.items()


def test_nested_columns_are_named_with_dots() -> None:
    record = {"extra_info": {"question": "q", "answer": "7"}, "reward_model.x": "8"}
    row = to_row(Columns("extra_info.question", "extra_info.answer"), "row 1", record)
    assert (row.question, json.loads(row.reference)["answer"]) == ("q", "7")
    row = to_row(Columns("extra_info.question", "reward_model.x"), "row 1", record)
    assert json.loads(row.reference)["answer"] == "8"
    with pytest.raises(UserError, match=r"no column 'extra_info.quest'"):
        to_row(Columns("extra_info.quest"), "row 1", record)


@pytest.mark.parametrize(
    ("answer", "stored"),
    [(7, "7"), (0, "0"), (True, "true"), (["1", 2], "1, 2"), ({"a": 1}, {"a": 1})],
)
def test_answers_of_any_type(answer: Any, stored: Any) -> None:
    row = to_row(Columns(), "row 1", {"prompt": "q", "answer": answer})
    assert json.loads(row.reference)["answer"] == stored


def test_a_row_with_tests_needs_no_answer() -> None:
    row = to_row(Columns(), "row 1", {"question": "q", "tests": {"kind": "script"}})
    assert json.loads(row.reference)["tests"] == {"kind": "script"}


def loaded(path: Path | str, rules: list[str], **keys: Any) -> PromptSource:
    config = DataConfig(source="file", path=str(path), **keys)
    specs = [VerifierSpec(name=name) for name in rules]
    return build_prompt_source(config, 1, 0, byte_tokenizer(), 500, specs)


def test_tasks_that_an_environment_alone_values_need_no_answer(tmp_path: Path) -> None:
    path = tmp_path / "games.jsonl"
    rows: list[dict[str, Any]] = [{"prompt": "Play.", "level": level} for level in range(5)]
    rows += [{"prompt": "Play.", "level": 4}, {"prompt": "Play.", "level": 5, "answer": ""}]
    path.write_text("\n".join(map(json.dumps, rows)))
    source = loaded(path, ["environment"])
    # Tasks with one question and other columns are other tasks; only the same twice is a repeat.
    assert (source.size, source.rows.repeated, len(source.rows.held_out)) == (6, 1, 1)
    assert any("question in prompt, no answer" in line for line in counted(source))
    tasks = [json.loads(source.next().reference) for _ in range(6)]
    assert {task["answer"] for task in tasks} == {None}
    assert sorted(task["level"] for task in tasks) == [0, 1, 2, 3, 4, 4]


@pytest.mark.parametrize("rules", [["environment", "math_answer"], ["math_answer"], []])
def test_an_answer_that_a_rule_judges_by_is_missed(tmp_path: Path, rules: list[str]) -> None:
    path = tmp_path / "games.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": f"Play {n}."}) for n in range(5)))
    with pytest.raises(UserError, match="no column with the answer"):
        loaded(path, rules)


def test_an_answer_column_that_is_named_is_missed(tmp_path: Path) -> None:
    path = tmp_path / "games.jsonl"
    path.write_text(json.dumps({"prompt": "Play.", "sum": ""}))
    with pytest.raises(UserError, match="has no answer"):
        loaded(path, ["environment"], answer_column="sum")


def records(count: int) -> list[dict[str, Any]]:
    return [
        VERL | {"prompt": [{"role": "user", "content": f"What is 1 + {n}?"}], "number": n}
        for n in range(count)
    ]


def test_files_of_every_kind_give_the_same_rows(tmp_path: Path) -> None:
    rows = records(6)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "a.json").write_text(json.dumps({"data": rows}))
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write(lines)
    (tmp_path / "many").mkdir()
    for part in range(2):
        half = rows[3 * part : 3 * part + 3]
        pq.write_table(pa.Table.from_pylist(half), tmp_path / "many" / f"train-{part}.parquet")
    names = ["a.parquet", "a.jsonl", "a.json", "a.jsonl.gz", "many", "many/train-*.parquet"]
    found = [
        [row.reference for row in loaded(tmp_path / name, ["math_answer"]).rows.train]
        for name in names
    ]
    assert all(one == found[0] for one in found)
    assert len(found[0]) == 5


def test_csv_is_text(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('question,answer\n"1, 2\n3?",6\nq2,7\nq3\n')
    with pytest.raises(UserError, match="row 2: another number of fields"):
        loaded(tmp_path / "a.csv", ["math_answer"])
    source = loaded(tmp_path / "a.csv", ["math_answer"], max_bad_rows=0.5)
    assert [row.question for row in source.rows.train] == ["1, 2\n3?"]


def test_rows_that_cannot_be_graded_are_found_at_load(tmp_path: Path) -> None:
    rows = records(4)
    rows[1] = rows[1] | {"reward_model": {"ground_truth": " "}}
    rows[2] = rows[2] | {"reward_model": {"ground_truth": r"\frac{1}{2"}}
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match="(?s)no answer.*not right when it is given back.*2 of 4"):
        loaded(path, ["math_answer"])
    source = loaded(path, ["math_answer"], max_bad_rows=0.5)
    assert [bad.place for bad in source.quarantine.rows] == [f"{path}, line 2", f"{path}, line 3"]
    with pytest.raises(UserError, match="none of the letters"):
        loaded(path, ["choice"])
    with pytest.raises(UserError, match="no tests for code_tests"):
        loaded(path, ["code_tests"])


def test_repeated_and_contradicted_questions_are_counted(tmp_path: Path) -> None:
    rows = [
        {"prompt": "a", "answer": 1},
        {"prompt": "a ", "answer": 1},
        {"prompt": "b", "answer": 1},
    ]
    rows += [{"prompt": "b", "answer": 2}, {"prompt": "c", "answer": 1}]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = loaded(path, ["math_answer"]).rows
    assert (found.repeated, found.contradicted) == (2, 1)


def test_all_turns_of_a_row_are_rendered(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(TRL | {"n": n}) + "\n" for n in range(1)))
    path.write_text(json.dumps(TRL) + "\n" + json.dumps(MESSAGES) + "\n")
    prompts = loaded(path, ["math_answer"], system_prompt="Mine.").some_prompts(2)
    texts = {prompt.text for prompt in prompts}
    assert texts == {
        "<system>Be brief.<user>What is 1 + 2?<assistant>",
        "<system>Mine.<user>What is 1 + 1?<assistant>2<user>What is 1 + 2?<assistant>",
    }
    plain = loaded(path, ["math_answer"], template="plain", plain_template="Q: {prompt}\nA:")
    assert {prompt.text for prompt in plain.some_prompts(2)} == {
        "Be brief.\n\nQ: What is 1 + 2?\nA:",
        "What is 1 + 1?\n\n2\n\nQ: What is 1 + 2?\nA:",
    }


IGNORES_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'user' %}U:{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}A:{% endif %}"
)
NEVER_ASKS = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}A:"
THINKS = (
    CHAT + "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
)


@pytest.mark.parametrize(
    ("keys", "template", "message"),
    [
        ({"system_prompt": "Be brief."}, IGNORES_SYSTEM, "leaves the system message out"),
        ({}, NEVER_ASKS, "does not ask the assistant to speak"),
        ({"chat_template_kwargs": {"enable_thinkin": False}}, THINKS, "enable_thinking"),
        ({}, CHAT + "</s>", "end with the EOS token"),
        ({"template": "plain", "plain_template": "<s>{prompt}"}, CHAT, "two BOS tokens"),
        ({"template": "plain", "chat_template_kwargs": {"a": 1}}, CHAT, "chat_template_kwargs"),
        ({"chat_template": "nowhere.jinja"}, CHAT, "cannot be read"),
    ],
)
def test_templates_are_tried_for_what_they_do(
    keys: dict[str, Any], template: str, message: str
) -> None:
    tokenizer = byte_tokenizer(template)
    tokenizer.add_special_tokens({"eos_token": "</s>"})
    with pytest.raises(UserError, match=message):
        Template(DataConfig(**keys), tokenizer)


def test_a_question_may_end_where_the_answer_begins() -> None:
    """As in `[INST] question [/INST] answer`, which needs no call to speak."""
    brackets = "{% for m in messages %}{% if m.role == 'user' %}[{{ m.content }}]"
    tokenizer = byte_tokenizer(brackets + "{% else %} {{ m.content }}.{% endif %}{% endfor %}")
    assert Template(DataConfig(), tokenizer).render("q") == "[q]"


def test_a_template_is_told_what_the_configuration_says(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(THINKS)
    config = DataConfig(chat_template_kwargs={"enable_thinking": False})
    assert Template(config, tokenizer).render("q") == "<user>q<assistant><think></think>"
    (tmp_path / "own.jinja").write_text(CHAT.replace("<assistant>", "ASSISTANT"))
    own = Template(DataConfig(chat_template=str(tmp_path / "own.jinja")), tokenizer)
    assert own.render("q") == "<user>qASSISTANT"


def test_special_tokens_without_a_name_are_control_tokens_too() -> None:
    from tokenizers import AddedToken

    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(
        [AddedToken("<|turn|>", special=True), AddedToken("a word", special=False)]
    )
    assert "<|turn|>" not in tokenizer.all_special_tokens
    template = Template(DataConfig(), tokenizer)
    (ids,) = template.encode_asked(["a<|turn|>b a word"])
    turn, word = tokenizer.convert_tokens_to_ids(["<|turn|>", "a word"])
    assert turn not in ids and word in ids
    assert tokenizer.decode(ids).endswith("<user>a<|turn|>b a word<assistant>")


def test_one_bos_where_template_and_tokenizer_both_write_one() -> None:
    tokenizer = byte_tokenizer("<s>" + CHAT)
    (ids,) = Template(DataConfig(), tokenizer).encode_asked(["q"])
    assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id
    with pytest.raises(UserError, match="two BOS tokens"):
        Template(DataConfig(), byte_tokenizer("<s><s>" + CHAT))


@pytest.mark.parametrize("how", ["chat", "plain"])
def test_what_a_user_says_becomes_no_control_token(how: Any) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>"})
    config = DataConfig(template=how, plain_template="Q: {prompt}\nA:")
    template = Template(config, tokenizer)
    (plain, spelled) = template.encode_asked(["a b", "a <|im_end|> b <s>"])
    assert plain == template.encode([template.render("a b")])[0]
    assert tokenizer.eos_token_id not in spelled
    assert spelled.count(tokenizer.bos_token_id) == plain.count(tokenizer.bos_token_id)
    assert tokenizer.decode(spelled).endswith(template.render("a <|im_end|> b <s>"))
