"""Prompts: wrong data, templates, the split, and a cursor that loses and repeats nothing."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from byte_tokenizers import byte_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from prompt_sources import LetterTokenizer, small_source

from actors.data.chat import Template
from actors.data.held_out import is_held_out
from actors.data.prompts import Prompt, PromptSource, build_prompt_source
from actors.data.schemas import Row
from actors.data.sources import Rows, question_key
from common.config.sections import DataConfig, ReasoningGymConfig
from common.errors import UserError


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return byte_tokenizer()


def build(
    config: DataConfig, tokenizer: Any, held_out: int = 2, seed: int = 0, limit: int = 500
) -> PromptSource:
    return build_prompt_source(config, held_out, seed, tokenizer, limit)


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def numbered(count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"question {i}", "answer": i} for i in range(count)]


def one_epoch(source: PromptSource) -> list[Prompt]:
    return [source.next() for _ in range(source.size)]


ONE_DIGIT = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}


def test_a_small_task_space_is_split_without_overlap(tokenizer: Any) -> None:
    gym = ReasoningGymConfig(params=dict(ONE_DIGIT), size=110)
    source = build(DataConfig(reasoning_gym=gym), tokenizer, held_out=60)
    train = [json.loads(p.reference) for p in one_epoch(source)]
    held_out = [json.loads(p.reference) for p in source.eval_prompts(60)]
    questions = [r["prompt"] for r in (*train, *held_out)]
    assert len(questions) == len(set(questions)) == 170
    assert train[0].keys() == {"prompt", "answer", "task", "params", "entry"}
    assert source.eval_prompts(5) == source.eval_prompts(60)[:5]
    assert not any(is_held_out(reference["prompt"]) for reference in train)
    assert all(is_held_out(reference["prompt"]) for reference in held_out)


def test_a_task_with_too_few_questions_says_so(tokenizer: Any) -> None:
    gym = ReasoningGymConfig(params=dict(ONE_DIGIT), size=5000)
    message = r"117 distinct questions to train on and 60 to hold out.*size=5000 .*eval\.prompts=60"
    with pytest.raises(UserError, match=message):
        build(DataConfig(reasoning_gym=gym), tokenizer, held_out=60)


@pytest.mark.parametrize(
    ("task", "params", "message"),
    [
        ("chain_sums", {}, "nearest: chain_sum"),
        ("chain_sum", {"min_termz": 2}, "min_termz.*Its params are min_terms, max_terms"),
        ("chain_sum", {"min_terms": 3, "max_terms": 2}, "max_terms must be >= min_terms"),
        ("chain_sum", {"min_terms": "two"}, "refused"),
        ("chain_sum", {"seed": 3}, "use the keys seed"),
    ],
)
def test_wrong_tasks_and_params(
    tokenizer: Any, task: str, params: dict[str, Any], message: str
) -> None:
    config = DataConfig(reasoning_gym=ReasoningGymConfig(task=task, params=params, size=10))
    with pytest.raises(UserError, match=message):
        build(config, tokenizer)


def test_training_rows_equal_to_held_out_ones_are_removed(tokenizer: Any, tmp_path: Path) -> None:
    rows = numbered(8)
    rows.insert(1, {"prompt": "question  7 ", "answer": 7})
    config = DataConfig(source="file", path=write_jsonl(tmp_path / "a.jsonl", rows))
    source = build(config, tokenizer, held_out=2)
    train = {question_key(json.loads(p.reference)["prompt"]) for p in one_epoch(source)}
    held_out = {question_key(json.loads(p.reference)["prompt"]) for p in source.eval_prompts(2)}
    # `question 7` was seen first as the second row, so it is not among the last distinct two.
    assert train.isdisjoint(held_out)
    assert source.size + source.removed + 2 == 9
    assert (source.removed > 0) == ("question 7" in held_out)


def test_held_out_rows_from_another_file(tokenizer: Any, tmp_path: Path) -> None:
    config = DataConfig(
        source="file",
        path=write_jsonl(tmp_path / "train.jsonl", numbered(6)),
        eval_path=write_jsonl(tmp_path / "eval.jsonl", numbered(2) + numbered(4)[3:]),
    )
    source = build(config, tokenizer, held_out=3)
    assert (source.size, source.removed) == (3, 3)
    asked = [json.loads(p.reference)["prompt"] for p in source.eval_prompts(3)]
    assert asked == ["question 0", "question 1", "question 3"]
    with pytest.raises(UserError, match=r"3 distinct questions, fewer than eval\.prompts=4"):
        build(config, tokenizer, held_out=4)


def test_parquet_and_jsonl_give_the_same_prompts(tokenizer: Any, tmp_path: Path) -> None:
    rows = [row | {"why": "because", "level": 0.5} for row in numbered(5)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    write_jsonl(tmp_path / "a.jsonl", rows)
    epochs = []
    for name in ("a.parquet", "a.jsonl"):
        config = DataConfig(source="file", path=str(tmp_path / name))
        config.solution_column, config.difficulty_column = "why", "level"
        epochs.append(one_epoch(build(config, tokenizer)))
    assert epochs[0] == epochs[1]
    assert (epochs[0][0].solution, epochs[0][0].difficulty) == ("because", 0.5)
    assert json.loads(epochs[0][0].reference)["answer"].isdigit()


def test_local_data_set_folders(tokenizer: Any, tmp_path: Path) -> None:
    import datasets

    data = datasets.Dataset.from_list(numbered(6))
    data.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": data, "test": data.select(range(2))}).save_to_disk(
        str(tmp_path / "both")
    )
    (tmp_path / "plain").mkdir()
    write_jsonl(tmp_path / "plain" / "train.jsonl", numbered(6))
    sizes = {}
    for name in ("one", "both", "plain"):
        config = DataConfig(source="hub", path=str(tmp_path / name))
        config.eval_path = "test" if name == "both" else None
        sizes[name] = build(config, tokenizer).size
    assert sizes == {"one": 4, "both": 4, "plain": 4}
    config = DataConfig(source="hub", path=str(tmp_path / "both"), split="dev")
    with pytest.raises(UserError, match="there are train, test"):
        build(config, tokenizer)


def test_a_data_set_out_of_reach(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def unreachable(*args: object, **kwargs: object) -> None:
        raise ConnectionError("Couldn't reach 'openai/gsm8k' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(UserError, match=r"cannot be reached.*Without a network"):
        build(DataConfig(source="hub", path="openai/gsm8k"), tokenizer)


def test_a_data_set_that_is_a_program(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "old.py").write_text("import datasets\n")
    with pytest.raises(UserError, match=r"loading script take a copy as Parquet"):
        build(DataConfig(source="hub", path=str(tmp_path / "old")), tokenizer)


GOOD = b'{"prompt": "q", "answer": "a"}\n'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has no rows"),
        (b"\n\n", "has no rows"),
        (GOOD + b"\n{'prompt': 1}\n", "line 3: not a JSON object"),
        (GOOD + b'{"prompt": "q"', "line 2: not a JSON object"),
        (GOOD + b"[1]\n", "line 2: a list"),
        (GOOD + b'{"prompt": "\xff", "answer": "a"}\n', r"line 2: not UTF-8 \(byte 12 is 0xff\)"),
        (GOOD + b'{"text": "q", "answer": "a"}\n', "no column with the question.*text, answer"),
        (GOOD + b'{"prompt": "q"}\n', "line 2: no column with the answer.*are prompt"),
        (b'{"prompt": ["q"], "answer": "a"}\n', "must be text or a list of messages"),
        (b'{"prompt": " ", "answer": "a"}\n', "blank"),
        (b'{"prompt": "\\ud800", "answer": "a"}\n', "no valid Unicode"),
        (b'{"prompt": "q", "answer": ' + b"9" * 5000 + b"}\n", "line 1: not a JSON object"),
        (b"[" * 100_000 + b"\n", "line 1: not a JSON object"),
        (b'{"prompt": "q", "answer": null}\n', "no column with the answer"),
        (b'{"prompt": "q", "answer": ""}\n', "'answer' has no answer"),
        (b'{"prompt": "q", "answer": NaN}\n', "'answer' has no answer"),
        (GOOD, "1 distinct questions, too few"),
    ],
)
def test_wrong_jsonl(tokenizer: Any, tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        build(DataConfig(source="file", path=str(path)), tokenizer)


def test_wrong_files(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"not parquet")
    (tmp_path / "a.txt").write_text("prompt,answer\n")
    for name, message in [
        ("missing.jsonl", "does not exist"),
        ("a.parquet", "cannot be read as Parquet"),
        ("a.txt", r"none of \.jsonl, \.json"),
    ]:
        with pytest.raises(UserError, match=message):
            build(DataConfig(source="file", path=str(tmp_path / name)), tokenizer)
    path = write_jsonl(tmp_path / "a.jsonl", numbered(5))
    config = DataConfig(source="file", path=path, difficulty_column="prompt")
    with pytest.raises(UserError, match="'prompt' must be a number, found a str"):
        build(config, tokenizer)


def test_a_few_bad_rows_are_left_out_and_written_down(tokenizer: Any, tmp_path: Path) -> None:
    rows = [json.dumps(row) for row in numbered(200)]
    rows[7] = "{'prompt': 1}"
    rows[8] = json.dumps({"prompt": "x" * 600, "answer": 1})
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(rows))
    config = DataConfig(source="file", path=str(path))
    source = build(config, tokenizer)
    assert source.size == 200 - 2 - 2  # two are held out
    assert not {"x" * 600, "question 7"} & {p.text for p in one_epoch(source)}
    source.quarantine.write(tmp_path / "bad.jsonl")
    bad = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
    assert [row["place"] for row in bad] == [f"{path}, line 8", f"{path}, line 9"]
    assert "not a JSON object" in bad[0]["reason"]
    assert bad[1]["record"] == "x" * 600
    config.max_bad_rows = 0.009
    with pytest.raises(UserError, match=r"2 of 200 rows cannot be used.*data\.max_bad_rows"):
        build(config, tokenizer)


def test_data_of_which_nothing_is_left_are_refused(tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"prompt": "x" * 300, "answer": 1}, {"prompt": "y" * 300, "answer": 2}]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    config = DataConfig(source="file", path=path, max_bad_rows=1.0)
    with pytest.raises(UserError, match="(?s)has 317 tokens.*no row is left to train on"):
        build(config, tokenizer, limit=100, held_out=0)


def test_fixed_prompts_are_held_out_ones_and_then_those_of_training(
    tokenizer: Any, tmp_path: Path
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", numbered(6))
    source = build(DataConfig(source="file", path=path), tokenizer)
    held_out = [prompt.text for prompt in source.eval_prompts(2)]
    assert [prompt.text for prompt in source.some_prompts(1)] == held_out[:1]
    texts = [prompt.text for prompt in source.some_prompts(100)]
    assert texts[:2] == held_out
    assert sorted(texts[2:]) == sorted(prompt.text for prompt in one_epoch(source))


def test_a_byte_order_mark_is_no_error(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    lines = [json.dumps(row) for row in numbered(5)]
    path.write_bytes(b"\xef\xbb\xbf" + "\n".join(lines).encode())
    assert build(DataConfig(source="file", path=str(path)), tokenizer).size == 3


def test_files_as_windows_and_editors_write_them(tokenizer: Any, tmp_path: Path) -> None:
    lines = [json.dumps(row).encode() for row in numbered(5)]
    lines[2] = json.dumps({"prompt": "a\u2028b", "answer": 2}, ensure_ascii=False).encode()
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b"\r\n\r\n".join(lines))  # no end of the last line
    source = build(DataConfig(source="file", path=str(path)), tokenizer)
    assert {row.question for row in source.rows.train} == {"question 0", "question 1", "a\u2028b"}


def test_many_prompts_that_are_too_long_are_named_and_left_out_on_demand(
    tokenizer: Any, tmp_path: Path
) -> None:
    rows = [{"prompt": "x" * 600 + str(n) if n % 3 else f"q {n}", "answer": n} for n in range(60)]
    config = DataConfig(source="file", path=write_jsonl(tmp_path / "a.jsonl", rows))
    with pytest.raises(UserError, match=r"(?s)40 rows: .*line 2: the prompt has 618 tokens.*40 of"):
        build(config, tokenizer)
    config.max_bad_rows = 0.7
    assert build(config, tokenizer).size == 18  # two are held out, though the last rows are long


def test_a_prompt_that_is_too_long_names_row_length_limit_and_key(
    tokenizer: Any, tmp_path: Path
) -> None:
    rows = [*numbered(5), {"prompt": "x" * 100, "answer": 1}]
    config = DataConfig(source="file", path=write_jsonl(tmp_path / "a.jsonl", rows))
    length = len("<user><assistant>") + 100
    message = rf"line 6: the prompt has {length} tokens and at most 116 .*model\.max_length"
    with pytest.raises(UserError, match=message):
        build(config, tokenizer, limit=length - 1)
    assert build(config, tokenizer, limit=length).size == 4


def test_chat_templates_give_the_tokens_the_tokenizer_gives(tokenizer: Any) -> None:
    template = Template(DataConfig(system_prompt="be {brief}"), tokenizer)
    text = template.render("1 + {x} = %s")
    assert text == "<system>be {brief}<user>1 + {x} = %s<assistant>"
    conversation = [
        {"role": "system", "content": "be {brief}"},
        {"role": "user", "content": "1 + {x} = %s"},
    ]
    whole = tokenizer.apply_chat_template(
        conversation, tokenize=True, add_generation_prompt=True, return_dict=False
    )
    assert template.encode([text]) == [whole]


def test_plain_templates_leave_other_braces_alone(tokenizer: Any) -> None:
    config = DataConfig(template="plain", plain_template='{"q": {prompt}} {0}')
    template = Template(config, tokenizer)
    assert template.render("{prompt} {x} {}") == '{"q": {prompt} {x} {}} {0}'
    assert template.encode(["ab"])[0][0] == tokenizer.bos_token_id


REFUSES = "{{ raise_exception('no system role') }}"


@pytest.mark.parametrize(
    ("config", "chat_template", "message"),
    [
        (DataConfig(), None, r"set data\.template=plain"),
        (DataConfig(system_prompt="x"), REFUSES, r"no system role.*drop data\.system_prompt"),
        (DataConfig(template="plain", plain_template="{question}"), None, r"has no \{prompt\}"),
        (DataConfig(template="plain", system_prompt="x"), None, r"data\.plain_template"),
    ],
)
def test_templates_that_do_not_fit(
    config: DataConfig, chat_template: str | None, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        Template(config, byte_tokenizer(chat_template))


def test_order_is_a_function_of_seed_and_epoch() -> None:
    first, again, other = small_source(20, 1), small_source(20, 1), small_source(20, 2)
    epochs = [[p.index for p in one_epoch(first)] for _ in range(2)]
    assert epochs == [[p.index for p in one_epoch(again)] for _ in range(2)]
    assert epochs[0] != epochs[1]
    assert epochs[0] != [p.index for p in one_epoch(other)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(20))
    assert [p.index for p in one_epoch(small_source(5, order="sequential"))] == list(range(5))


def test_a_curriculum_goes_from_easy_to_hard_in_every_epoch() -> None:
    template = Template(DataConfig(template="plain"), LetterTokenizer())
    grades = [3.0, 1.0, 2.0, 1.0]
    rows = [Row(f"q{i}", "{}", None, grade, f"row {i}") for i, grade in enumerate(grades)]
    source = PromptSource(Rows(rows, [], 0), template, 5, "curriculum")
    for _ in range(2):
        assert [p.index for p in one_epoch(source)] == [1, 3, 2, 0]
    rows[2] = Row("q2", "{}", None, None, "file.jsonl line 3")
    with pytest.raises(UserError, match="file.jsonl line 3 has no difficulty"):
        PromptSource(Rows(rows, [], 0), template, 5, "curriculum")


@settings(max_examples=200, deadline=None)
@given(
    size=st.integers(1, 6),
    actions=st.lists(st.sampled_from(["next", "next", "train", "back", "resume"]), max_size=80),
    choices=st.randoms(use_true_random=False),
)
def test_every_prompt_is_trained_on_once_an_epoch(
    size: int, actions: list[str], choices: Any
) -> None:
    """Any interleaving of serving, training, giving back and resuming, then a drain."""
    source = small_source(size)
    out: list[Prompt] = []
    waiting: list[int] = []  # given back, not served again yet
    trained: Counter[tuple[int, int]] = Counter()
    served = 0
    for action in actions:
        if action == "next":
            out.append(source.next())
            waiting = [ticket for ticket in waiting if ticket != out[-1].ticket]
            served = max(served, out[-1].ticket + 1)
        elif action == "resume":
            again = sorted([*waiting, *(prompt.ticket for prompt in out)])
            source, out, waiting = small_source(size), [], again
            source.seek(served, again)
        elif out:
            prompt = out.pop(choices.randrange(len(out)))
            if action == "back":
                source.give_back(prompt.ticket)
                waiting.append(prompt.ticket)
            else:
                trained[prompt.epoch, prompt.index] += 1
    trained.update((p.epoch, p.index) for p in out)
    epochs = served // size + 1
    while (prompt := source.next()).epoch < epochs:
        trained[prompt.epoch, prompt.index] += 1
    expected = {(epoch, index) for epoch in range(epochs) for index in range(size)}
    assert trained == Counter(dict.fromkeys(expected, 1))


def test_what_was_given_back_comes_before_what_is_new() -> None:
    source = small_source(5)
    first, second, third, fourth = [source.next() for _ in range(4)]
    source.give_back(second.ticket)
    source.give_back(first.ticket)
    assert [source.next() for _ in range(2)] == [second, first]
    resumed = small_source(5)
    resumed.seek(3, [2, 0])
    assert [resumed.next() for _ in range(3)] == [third, first, fourth]


def test_misuse_of_the_cursor_is_refused() -> None:
    source = small_source(3)
    prompt = source.next()
    source.give_back(prompt.ticket)
    for ticket in (prompt.ticket, 1, -1):
        with pytest.raises(ValueError, match="not out"):
            source.give_back(ticket)
    with pytest.raises(ValueError, match="held out"):
        source.eval_prompts(1)


def test_other_prompts_have_another_identity() -> None:
    others = [small_source(4), small_source(3, 1), small_source(3, 0, "sequential")]
    assert len({source.identity for source in [small_source(3), *others]}) == 4
    assert small_source(3).identity == small_source(3).identity


def test_prompt_ids_are_distinct_and_stay(tokenizer: Any, tmp_path: Path) -> None:
    rows = numbered(3) + numbered(3) + [{"prompt": f"held {i}", "answer": 0} for i in range(2)]
    config = DataConfig(source="file", path=write_jsonl(tmp_path / "a.jsonl", rows))
    source = build(config, tokenizer)
    ids = [{p.prompt_id for p in one_epoch(source)} for _ in range(2)]
    assert ids[0] == ids[1]
    assert len(ids[0]) == 6
