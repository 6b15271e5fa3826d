"""Suites: their files, how records become problems, graders on right and wrong answers."""

from __future__ import annotations

import base64
import gzip
import json
import pickle
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from actors.data.held_out import is_held_out
from actors.data.quarantine import Quarantine
from actors.data.sources import load_rows, question_key
from actors.sandbox.sandbox import RuleSpec, Sandbox, Task
from actors.verifiers import choice, code_tests, math_answer, reasoning_gym
from actors.verifiers.registry import JUDGE, resolve, voter
from common.config.load import load_config
from common.errors import UserError
from deploy.eval.code_problems import (
    LIVE_CODE_BENCH_SCRIPT,
    LIVE_CODE_BENCH_SETUP,
    hidden_cases,
    human_eval,
)
from deploy.eval.suite import SUITES, Suite, known_suites, load_problems, load_suite

OFFLINE = [name for name in known_suites() if load_suite(name).source == "reasoning_gym"]
ASKED_FOR = (
    "aime24 aime25 math500 amc23 minerva_math olympiadbench gsm8k gpqa_diamond humaneval "
    "livecodebench arithmetic-small arithmetic algebra logic games calculator"
)


# Files


def test_there_are_the_suites_of_the_readme_and_each_has_its_section() -> None:
    assert known_suites() == sorted(ASKED_FOR.split())
    headings = [
        line.removeprefix("## ").split(",")[0]
        for line in (SUITES / "README.md").read_text().splitlines()
        if line.startswith("## ")
    ]
    assert sorted(name for name in headings if name in known_suites()) == known_suites()


@pytest.mark.parametrize("name", known_suites())
def test_a_suite_has_a_grader_that_can_be_used_and_says_where_its_data_are_from(name: str) -> None:
    suite = load_suite(name)
    if suite.grader.name != "environment":
        resolve("rule", suite.grader.name, dict(suite.grader.args))
    assert suite.license
    assert suite.source != "hub" or "never downloaded" in suite.unverified.lower()
    if "total_seconds" in suite.grader.args:
        assert suite.grader.args["total_seconds"] < suite.verdict_timeout_s


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("about: x", "license|max_tokens|mandatory"),
        ("abut: x", "abut"),
        ("max_tokens: many", "max_tokens"),
        ("{path: x, max_tokens: 5, license: x, about: x, prompt: solve}", "no {question}"),
        ("{max_tokens: 5, license: x, about: x}", "needs path"),
        ("{path: x, max_tokens: 5, license: x, about: x, samples: 0}", "samples=0"),
        ("{path: x, max_tokens: 5, license: x, about: x, temperature: .nan}", "temperature=nan"),
        ("{path: x, max_tokens: 5, license: x, about: x, verdict_timeout_s: 0}", "_s=0.0 must be"),
        ("{path: x, max_tokens: 5, license: x, about: x, rows: choice}", "wrong_columns"),
        ("{path: x, max_tokens: 5, license: x, about: x, rows: essay}", "rows"),
        ("[1, 2]", "mapping"),
        ("{source: file, max_tokens: 5, license: x, about: x}", "needs path"),
        (
            "{source: file, path: x, rows: human_eval, max_tokens: 5, license: x, about: x}",
            "rows=human_eval",
        ),
        (
            "{path: x, max_tokens: 5, license: x, about: x, environment: {max_turns: 0}}",
            "max_turns=0",
        ),
        ("{path: x, max_tokens: 5, license: x, about: x, environment: {turns: 2}}", "turns"),
    ],
)
def test_a_file_that_is_no_suite_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        suite = load_suite(str(path))
        load_problems(suite)  # a mandatory key may be missed first here


# Questions of a file


def test_the_calculator_asks_what_its_preset_has_not_trained_on() -> None:
    suite = load_suite("calculator")
    rows = load_problems(suite)
    preset = SUITES.parent / "calculator.jsonl"
    trained = {json.loads(line)["prompt"][-1]["content"] for line in preset.open()}
    assert len({row.question for row in rows}) == len(rows) == suite.problems
    assert not trained & {row.question for row in rows}
    for row in rows:
        left, right = map(int, re.findall(r"\d+", row.question))
        assert json.loads(row.reference)["answer"] == str(left * right)
        assert [turn["role"] for turn in row.conversation][-3:] == ["user", "assistant", "user"]


def test_a_file_beside_the_suite_keeps_earlier_turns_and_every_column(tmp_path: Path) -> None:
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2?"}]
    rows = [{"prompt": turns, "answer": "4", "secret": 7}, {"prompt": "3 + 3?", "answer": "6"}]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "mine.yaml").write_text(
        "{source: file, path: mine.jsonl, max_tokens: 5, license: x, about: x, "
        "prompt: 'Q: {question}'}"
    )
    first, second = load_problems(load_suite(str(tmp_path / "mine.yaml")))
    assert first.conversation == [turns[0], {"role": "user", "content": "Q: 2 + 2?"}]
    assert json.loads(first.reference)["secret"] == 7
    assert (second.question, second.messages) == ("Q: 3 + 3?", ())


def test_tasks_that_an_environment_grades_need_no_answer(tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").write_text('{"prompt": "Play.", "game": 1}')
    text = "{source: file, path: mine.jsonl, max_tokens: 5, license: x, about: x"
    (tmp_path / "mine.yaml").write_text(text + ", grader: {name: environment}}")
    (row,) = load_problems(load_suite(str(tmp_path / "mine.yaml")))
    assert json.loads(row.reference)["game"] == 1
    (tmp_path / "mine.yaml").write_text(text + "}")
    with pytest.raises(UserError, match="answer"):
        load_problems(load_suite(str(tmp_path / "mine.yaml")))


# Drawn questions


@pytest.mark.parametrize("name", OFFLINE)
def test_drawn_questions_are_held_out_distinct_and_the_same_each_time(name: str) -> None:
    suite = load_suite(name)
    suite.prompt = "{question}"
    suite.reasoning_gym.size = min(60, suite.reasoning_gym.size)  # of games 200 take half a minute
    rows = load_problems(suite)
    assert len(rows) == suite.reasoning_gym.size
    assert all(is_held_out(row.question) for row in rows)
    assert len({question_key(row.question) for row in rows}) == len(rows)
    suite.reasoning_gym.size = 5
    assert [row.question for row in load_problems(suite)] == [row.question for row in rows[:5]]


@pytest.mark.parametrize("name", OFFLINE)
def test_the_grader_knows_the_stored_answers_and_refuses_others(name: str) -> None:
    suite = load_suite(name)
    suite.reasoning_gym.size = 10
    for row in load_problems(suite):
        reference = json.loads(row.reference)
        right = f"I think so.\n{reference['answer']}"
        assert reasoning_gym.score(right, reference, **suite.grader.args).kind == "pass"
        for wrong in ("", "I do not know", f"{reference['answer']}\n-98765"):
            assert reasoning_gym.score(wrong, reference, **suite.grader.args).kind == "fail"
        vote = voter("reasoning_gym")
        assert vote is not None
        assert vote(right, reference, **suite.grader.args) is not None


@pytest.mark.parametrize("seed", [0, 1, 20250])
def test_arithmetic_small_is_what_smollm2_trains_on_but_no_question_of_its_training(
    seed: int,
) -> None:
    config = load_config([SUITES.parent / "smollm2.yaml"], [], SUITES.parent / "recipes")
    suite = load_suite("arithmetic-small")
    assert suite.reasoning_gym.task == config.data.reasoning_gym.task
    assert suite.reasoning_gym.params == config.data.reasoning_gym.params
    assert suite.max_tokens == config.generator.max_completion_tokens
    trained = load_rows(config.data, config.eval.prompts, seed, Quarantine(0.0)).train
    asked = {question_key(row.question) for row in load_problems(suite)}
    assert len(asked) == 80
    assert not asked & {question_key(row.question) for row in trained}


# Records of data sets

CASES = [
    {"input": "3\n", "output": "6\n", "testtype": "stdin"},
    {"input": "4\n", "output": "8\n", "testtype": "stdin"},
]
PACKED = base64.b64encode(zlib.compress(pickle.dumps(json.dumps(CASES[1:])))).decode()
GPQA = {
    "Question": "Which?",
    "Correct Answer": "right",
    "Incorrect Answer 1": "w1",
    "Incorrect Answer 2": "w2",
    "Incorrect Answer 3": "w3",
}
LCB = {
    "question_content": "Double the number.",
    "starter_code": "",
    "public_test_cases": json.dumps(CASES[:1]),
    "private_test_cases": PACKED,
    "metadata": "{}",
}
LEET = LCB | {
    "starter_code": "class Solution:\n    def twice(self, n: int) -> int:",
    "public_test_cases": json.dumps([{"input": "3", "output": "6", "testtype": "functional"}]),
    "private_test_cases": json.dumps([{"input": "4", "output": "8", "testtype": "functional"}]),
    "metadata": json.dumps({"func_name": "twice"}),
}
HUMAN_EVAL = {
    "prompt": "import math\n\ndef root(n: int) -> int:\n    '''The whole square root.'''\n",
    "test": "def check(candidate):\n    assert candidate(16) == 4\n    assert candidate(17) == 4\n",
    "entry_point": "root",
}


def problems(tmp_path: Path, name: str, *records: dict[str, Any]) -> list[dict[str, Any]]:
    """Question and reference of each record, read from a file as `--data` does."""
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    suite = load_suite(name)
    suite.problems = None
    rows = load_problems(suite, str(path))
    return [{"question": row.question, **json.loads(row.reference)} for row in rows]


@pytest.mark.parametrize(
    ("name", "record", "answer"),
    [
        ("aime24", {"problem": "How many?", "answer": "204"}, "204"),
        ("aime25", {"problem": "How many?", "answer": "336^\\circ"}, "336^\\circ"),
        ("math500", {"problem": "How many?", "answer": "\\frac{1}{2}"}, "\\frac{1}{2}"),
        ("amc23", {"question": "How many?", "answer": 27.0}, "27.0"),
        ("minerva_math", {"question": "How many?", "answer": "1.6e-19"}, "1.6e-19"),
        ("olympiadbench", {"question": "How many?", "final_answer": ["$1$", "$2$"]}, "$1$, $2$"),
        ("gsm8k", {"question": "How many?", "answer": "He has 3.\n#### 3"}, "He has 3.\n#### 3"),
    ],
)
def test_answers_of_mathematics(
    tmp_path: Path, name: str, record: dict[str, Any], answer: str
) -> None:
    (problem,) = problems(tmp_path, name, record)
    assert problem["answer"] == answer
    assert problem["prompt"] == "How many?"
    assert problem["question"].startswith("How many?\n\nReason step by step")
    assert r"\boxed{}" in problem["question"]
    stored = answer.rpartition("####")[2].strip()
    right = math_answer.score(rf"It is \boxed{{{stored.replace('$', '')}}}", problem)
    assert right.kind == "pass"
    assert math_answer.score(r"It is \boxed{5}", problem).kind == "fail"


def test_options_are_shuffled_by_problem_and_the_letter_follows_them(tmp_path: Path) -> None:
    records = [GPQA | {"Question": f"Which is number {n}?"} for n in range(40)]
    asked = problems(tmp_path, "gpqa_diamond", *records)
    assert asked == problems(tmp_path, "gpqa_diamond", *records)
    letters = []
    for problem in asked:
        listed = dict(
            line.split(") ", 1) for line in problem["question"].splitlines() if ") " in line
        )
        assert listed[problem["answer"]] == "right"
        assert sorted(listed.values()) == ["right", "w1", "w2", "w3"]
        letters.append(problem["answer"])
        assert choice.score(rf"\boxed{{{problem['answer']}}}", problem).kind == "pass"
    assert set(letters) == set("ABCD")


def test_a_problem_of_code_reaches_its_grader_whole(tmp_path: Path) -> None:
    stdin, leet = problems(tmp_path, "livecodebench", LCB, LEET)
    double = "```python\nprint(2 * int(input()))\n```"
    assert code_tests.score(double, stdin).kind == "pass"
    only_public = "```python\ninput()\nprint(6)\n```"
    assert code_tests.score(only_public, stdin).reason == "wrong output at case 2 of 2"
    solution = "class Solution:\n    def twice(self, n: int) -> int:\n        return gcd(n, 0) * 2"
    method = f"```\n{solution}\n```"
    assert code_tests.score(method, leet).kind == "pass"
    assert "class Solution" in leet["question"]
    (human,) = problems(tmp_path, "humaneval", HUMAN_EVAL)
    body = "```python\ndef root(n):\n    return math.isqrt(n)\n```"  # the prompt's import stays
    assert code_tests.score(body, human).kind == "pass"
    assert code_tests.score(body.replace("isqrt", "sqrt"), human).kind == "fail"
    future = "# mine\n\nfrom __future__ import annotations\n"
    for program in (only_public, double, method, body):
        given = human if program is body else leet if program is method else stdin
        plain = code_tests.score(program, given)
        first = program.replace("\n", f"\n{future}", 1)
        assert code_tests.score(first, given) == plain
    late = body.replace("    return", "    pass\nfrom __future__ import annotations\n    return")
    assert code_tests.score(late, human).kind == "fail"


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("it ran",)


@pytest.mark.parametrize("stored", ["", "no base64!", base64.b64encode(b"x").decode()])
def test_private_tests_that_are_none_are_refused(stored: str) -> None:
    with pytest.raises(ValueError, match="cannot be read"):
        hidden_cases(stored)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("text", ["x", "é" * 300, "y" * 70_000])
def test_private_tests_are_read_from_a_pickle_of_any_protocol(protocol: int, text: str) -> None:
    cases = [{"input": text, "output": "1", "testtype": "stdin"}]
    pickled = pickle.dumps(json.dumps(cases), protocol)
    assert hidden_cases(base64.b64encode(zlib.compress(pickled)).decode()) == cases


def test_reading_private_tests_runs_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    packed = base64.b64encode(zlib.compress(pickle.dumps(Evil()))).decode()
    with pytest.raises(ValueError, match="no pickled text"):
        hidden_cases(packed)
    assert "it ran" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "record", "message"),
    [
        ("math500", {"question": "x", "answer": "1"}, "'problem'"),
        ("math500", {"problem": "x", "answer": ""}, "'answer' is empty"),
        ("olympiadbench", {"question": "x", "final_answer": []}, "'final_answer' is empty"),
        ("math500", {"problem": None, "answer": "1"}, "must be text"),
        ("gpqa_diamond", GPQA | {"Incorrect Answer 1": "right"}, "among the wrong"),
        ("humaneval", HUMAN_EVAL | {"entry_point": "f(); import os"}, "no name"),
        ("livecodebench", LCB | {"private_test_cases": "?"}, "row of livecodebench"),
    ],
)
def test_a_record_that_is_none_of_the_suite_says_so(
    tmp_path: Path, name: str, record: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        problems(tmp_path, name, record)


def test_a_part_of_a_suite_is_not_the_suite(tmp_path: Path) -> None:
    path = tmp_path / "aime.parquet"
    table = pa.table({"problem": ["a", "b"], "answer": ["1", "2"]})
    pq.write_table(table, path)
    with pytest.raises(UserError, match="has 30 problems and .* has 2 rows"):
        load_problems(load_suite("aime24"), str(path))
    suite: Suite = load_suite("aime24")
    suite.problems = 2
    assert len(load_problems(suite, str(path))) == 2
    with pytest.raises(UserError, match="--limit 3"):
        load_problems(suite, str(path), limit=3)
    with pytest.raises(UserError, match="reads no file"):
        load_problems(load_suite("algebra"), str(path))


def test_a_copy_of_a_suite_in_the_schema_of_a_trainer_is_read(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {
            "data_source": "aime",
            "prompt": [{"role": "user", "content": f"Find {n}."}],
            "reward_model": {"ground_truth": str(n), "style": "rule"},
        }
        for n in range(30)
    ]
    path = tmp_path / "aime-2024.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    found = load_problems(load_suite("aime24"), str(path))
    assert "Find 7." in found[7].question and "boxed" in found[7].question
    assert json.loads(found[7].reference)["answer"] == "7"
    system = {"role": "system", "content": "Be brief."}
    rows[0]["prompt"] = [system, *rows[0]["prompt"]]
    pq.write_table(pa.Table.from_pylist(rows), path)
    with pytest.raises(UserError, match="more turns than the question"):
        load_problems(load_suite("aime24"), str(path))


def test_a_suite_is_read_as_it_is_shipped(tmp_path: Path) -> None:
    path = tmp_path / "HumanEval.jsonl.gz"
    with gzip.open(path, "wt") as file:
        file.write("".join(json.dumps(HUMAN_EVAL) + "\n" for _ in range(164)))
    found = load_problems(load_suite("humaneval"), str(path))
    reference = json.loads(found[0].reference)
    right = "```python\ndef root(n):\n    return math.isqrt(n)\n```"
    whole = f"```python\n{HUMAN_EVAL['prompt']}    return math.isqrt(n)\n```"
    nothing = "```python\ndef root(n):\n    return None\n```"
    kinds = [code_tests.score(text, reference).kind for text in (right, whole, nothing)]
    assert (len(found), kinds) == (164, ["pass", "pass", "fail"])


# Mathematics: (stored, completion, verdict)

MATHEMATICS = [
    # boxes
    (r"\frac{3}{4}", r"\boxed{\dfrac34}", "pass"),
    (r"\frac{3}{4}", r"\boxed{\boxed{\frac{3}{4}}}", "pass"),
    (r"\frac{3}{4}", r"so $\boxed{\frac{3}{4}}$.", "pass"),
    (r"\frac{3}{4}", r"\boxed{\frac{3}{5}}", "fail"),
    ("2", r"First \boxed{1}. No: \boxed{2}", "pass"),
    ("1", r"First \boxed{1}. No: \boxed{2}", "fail"),
    ("2", r"\boxed{1} or \boxed{2}", "fail"),
    (r"\{1,2\}", r"\boxed{1} and \boxed{2}", "pass"),
    ("70", r"<think>\boxed{71}</think> \boxed{70}", "pass"),
    ("71", r"<think>\boxed{71}</think> \boxed{70}", "fail"),
    ("70", r"<think>\boxed{70}</think> I do not know", "fail"),
    ("7", r"\boxed{7.}", "pass"),
    # fractions, decimals, mixed numbers, percentages
    ("0.5", r"\boxed{\frac12}", "pass"),
    (r"\frac{1}{3}", r"\boxed{0.33333333}", "pass"),
    (r"\frac{1}{3}", r"\boxed{0.333}", "fail"),
    ("2 1/2", r"\boxed{\frac{5}{2}}", "pass"),
    ("5/2", r"\boxed{2\frac{1}{2}}", "pass"),
    ("-2.5", r"\boxed{-2 1/2}", "pass"),
    ("2 1/2", r"\boxed{\frac{1}{2}}", "fail"),
    (r"50\%", r"\boxed{0.5}", "pass"),
    ("50", r"\boxed{50\%}", "pass"),
    ("50", r"\boxed{0.5}", "fail"),
    # thousands, money, units, degrees
    ("1,000,000", r"\boxed{1000000}", "pass"),
    ("1000000", r"\boxed{1{,}000{,}000}", "pass"),
    ("1000000", r"\boxed{1\,000\,000}", "pass"),
    (r"\$32,\!348", r"\boxed{32348}", "pass"),
    (r"\$32,\!348", r"\boxed{32349}", "fail"),
    ("1000000", r"\boxed{1,000}", "fail"),
    ("70", r"\boxed{\$70}", "pass"),
    ("70", r"\boxed{\text{70 apples}}", "pass"),
    ("70", r"\boxed{70\text{ km/h}}", "pass"),
    (r"336^\circ", r"\boxed{336}", "pass"),
    # signs
    ("-3", "\\boxed{\N{MINUS SIGN}3}", "pass"),
    ("-3", r"\boxed{3}", "fail"),
    # very large and very small
    ("1.6e-19", r"\boxed{1.60 \times 10^{-19}}", "pass"),
    (r"1.6 \times 10^{-19}", r"\boxed{1.6e-19}", "pass"),
    ("1.6e-19", r"\boxed{2.6 \times 10^{-19}}", "fail"),
    ("1.6e-19", r"\boxed{0}", "fail"),
    ("4.5e33", r"\boxed{4.5 \times 10^{33}}", "pass"),
    ("4.5e33", r"\boxed{4.6 \times 10^{33}}", "fail"),
    # intervals, tuples, sets
    ("[1,2]", r"\boxed{[1,2)}", "fail"),
    (r"(-\infty, 3)", r"\boxed{(-\infty, 3)}", "pass"),
    ("(1,2)", r"\boxed{(2,1)}", "fail"),
    (r"\left( 3, \frac{\pi}{2} \right)", r"\boxed{(3,\frac{\pi}{2})}", "pass"),
    (r"\{1,2\}", r"\boxed{\{2,1\}}", "pass"),
    ("2", r"\boxed{2,4}", "fail"),
    ("2,4", r"\boxed{2}", "fail"),
    ("$10$, $-2$", r"\boxed{-2, 10}", "pass"),
    # text
    (r"\text{Evelyn}", r"\boxed{Evelyn}", "pass"),
    (r"\text{Evelyn}", r"\boxed{\text{Carla}}", "fail"),
    # forms of saying so, and prose after it
    ("70", "The answer is 70, because seven times ten is seventy.", "pass"),
    ("70", r"The final answer is \(70\). I hope it is correct.", "pass"),
    ("70", "**Answer:** 70", "pass"),
    ("70", r"\boxed{70} is the answer, not 71.", "pass"),
    ("70", "\\boxed{70}\n\nLet me check: 1 + 1 = 2.", "pass"),
    ("204", "204 is wrong, so 205", "fail"),
    ("He pays.\n#### 18", "She makes $<<9*2=18>>18 every day.\n#### 18", "pass"),
    # nothing
    ("70", "", "fail"),
    ("70", "   \n", "fail"),
    ("70", r"\boxed{}", "fail"),
    ("70", "answer", "fail"),
]


@pytest.mark.parametrize(("stored", "text", "kind"), MATHEMATICS)
def test_mathematics(stored: str, text: str, kind: str) -> None:
    assert math_answer.score(text, {"answer": stored}).kind == kind


ALIKE = [
    [r"\boxed{0.50}", r"\boxed{\frac{1}{2}}", r"\boxed{\dfrac12}", "1/2", "The answer is 0.5."],
    ["The answer is 1,234.", r"\boxed{1{,}234}", r"$1234$", "1234 apples are left"],
    [r"\boxed{x = 5}", "so $x=5$.", "5"],
    [r"\boxed{\text{(C)}}", "The answer is (C).", r"\boxed{C}"],
    [r"\boxed{(1, 2]}", r"\boxed{\left(1,2\right]}"],
    [r"\boxed{-3}", "$-3$"],
    [r"\boxed{50\%}"],
    [r"\boxed{north}", "We go North.\nThe answer is north."],
]


def test_votes_put_together_what_is_one_answer_and_nothing_else() -> None:
    keys = [{math_answer.vote(text, {}) for text in alike} for alike in ALIKE]
    assert all(len(key) == 1 for key in keys), keys
    assert None not in set().union(*keys)
    assert len(set().union(*keys)) == len(ALIKE)
    assert {math_answer.vote(text, {}) for text in ("", r"\boxed{}", "<think>4")} <= {
        None,
        "<think>4",
    }


# Multiple choice: (completion, letter)

LETTERS = [
    (r"\boxed{B}", "B"),
    (r"\boxed{\text{B}}", "B"),
    (r"\boxed{(B)}", "B"),
    (r"\boxed{B) 3 eV}", "B"),
    (r"The final answer is $\boxed{\textbf{D}}$", "D"),
    ("The answer is (C).", "C"),
    ("**Answer:** D", "D"),
    ("The correct answer is: **B**", "B"),
    ("The correct option is option C", "C"),
    ("The answer is A, not B.", "A"),
    ("The answer is B. No wait, the answer is C", "C"),
    ("I weigh them all.\n(C)", "C"),
    ("<think>The answer is B</think>\nThe answer is D", "D"),
    ("<think>The answer is A</think>", None),
    ("I think A is good", None),
    ("A man walks", None),
    ("the answer is a number", None),
    ("Answer: Because", None),
    (r"\boxed{A, B}", None),
    (r"\boxed{A} or \boxed{B}", None),
    (r"\boxed{42}", None),
    (r"\boxed{}", None),
    ("", None),
]


@pytest.mark.parametrize(("text", "letter"), LETTERS)
def test_choices(text: str, letter: str | None) -> None:
    assert choice.vote(text, {}) == letter
    for stored in "ABCD":
        expected = "pass" if stored == letter else "fail"
        assert choice.score(text, {"answer": stored}).kind == expected


@pytest.mark.parametrize("stored", ["", None, "AB", "z"])
def test_a_stored_choice_that_is_no_letter_is_an_error(stored: Any) -> None:
    with pytest.raises(ValueError, match="none of the letters"):
        choice.score("A", {"answer": stored})


# Programs, in the sandbox that judges them in a run

SQUARE = {
    "kind": "script",
    "setup": "",
    "script": "def check(f):\n    assert f(3) == 9\ncheck(square)",
}
DOUBLE = {"kind": "stdin", "cases": code_tests.pack([("3\n", "6\n"), ("4\n", "8")])}
PAIR = {"kind": "call", "function": "pair", "cases": code_tests.pack([("[1, 2]\n3", "[1, 3]")])}
SEPARATED = {
    "kind": "call",
    "function": "length",
    "cases": code_tests.pack([('"a\u2028b"', "3"), ('"a\u0085b"', "3")]),
}
MANY = {
    "kind": "call",
    "function": "wait",
    "cases": code_tests.pack([(str(seconds), "1") for seconds in (0.5, 0.5, 0.5)]),
}
LEAVING = {
    "kind": "stdin",
    "setup": LIVE_CODE_BENCH_SCRIPT,
    "cases": code_tests.pack([("3\n", "6\n")]),
}
LARGE = LEAVING | {"cases": code_tests.pack([("", "30001")])}
DEEP = {
    "kind": "call",
    "function": "down",
    "setup": LIVE_CODE_BENCH_SETUP,
    "cases": code_tests.pack([("5000", "5000"), ("20000", "20000")]),
}
BOOLEAN = {"kind": "call", "function": "down", "cases": code_tests.pack([("1", "1")])}
RIGHT = "def square(x):\n    return x * x"

PROGRAMS: list[tuple[str, dict[str, Any], str, str]] = [
    # what is right
    (RIGHT, SQUARE, "pass", ""),
    ("import numpy\ndef square(x):\n    return int(numpy.square(x))", SQUARE, "pass", ""),
    (
        "import threading\nfound = []\nt = threading.Thread(target=lambda: found.append(1))\n"
        f"t.start(); t.join()\nassert found\n{RIGHT}",
        SQUARE,
        "pass",
        "",
    ),
    ("print(int(input()) * 2)", DOUBLE, "pass", ""),
    ("print(int(input()) * 2.0, '\\n')", DOUBLE, "pass", ""),
    (
        "if __name__ == '__main__':\n    import sys\n    print(2 * int(sys.stdin.read()))",
        DOUBLE,
        "pass",
        "",
    ),
    # standard input and output in every form
    ("import sys\nprint(int(sys.stdin.buffer.read()) * 2)", DOUBLE, "pass", ""),
    ("print(int(open(0).read()) * 2)", DOUBLE, "pass", ""),
    ("import os\nprint(int(os.read(0, 100)) * 2)", DOUBLE, "pass", ""),
    ("import sys\ninput = sys.stdin.readline\nprint(int(input()) * 2)", DOUBLE, "pass", ""),
    ("import sys\nfor line in sys.stdin:\n    print(int(line) * 2)", DOUBLE, "pass", ""),
    (
        "import sys\nsys.stdout.buffer.write(str(int(input()) * 2).encode())",
        DOUBLE,
        "pass",
        "",
    ),
    ("import os\nos.write(1, str(int(input()) * 2).encode())", DOUBLE, "pass", ""),
    ("class Solution:\n    def pair(self, a, b):\n        return a[0], b", PAIR, "pass", ""),
    ("def pair(a, b):\n    return [a[0], b]", PAIR, "pass", ""),
    ("import numpy\ndef pair(a, b):\n    return numpy.array([a[0], b])", PAIR, "pass", ""),
    (
        "from fractions import Fraction as F\ndef pair(a, b):\n    return [F(1), b]",
        PAIR,
        "pass",
        "",
    ),
    ("def length(text):\n    return len(text)", SEPARATED, "pass", ""),
    ("def down(n):\n    return 0 if n == 0 else 1 + down(n - 1)", DEEP, "pass", ""),
    (
        "@cache\ndef down(n):\n    return 0 if n == 0 else 1 + down(n - 1)",
        DEEP,
        "pass",
        "",
    ),
    # the suite's own grader looks at what was printed, not at how a program leaves
    ("print(int(input()) * 2)\nsys.exit(1)", LEAVING, "pass", ""),
    ("print(int(input()) * 2)\nexit(1)", LEAVING, "pass", ""),
    ("def main():\n    print(int(input()) * 2)\n    exit()\nmain()", LEAVING, "pass", ""),
    ("print(int(input()) * 2)\nraise ValueError", LEAVING, "fail", "exit status 1"),
    ("exit(0)\nprint(int(input()) * 2)", LEAVING, "fail", "wrong output"),
    ("print(len(str(10 ** 30000)))", LARGE, "pass", ""),
    # the limit is that of a call, not of all together
    ("import time\ndef wait(s):\n    time.sleep(s)\n    return 1", MANY, "pass", ""),
    ("import time\ndef wait(s):\n    time.sleep(30)", MANY, "fail", "time limit of a call"),
    ("def wait(s):\n    while True: pass", MANY, "fail", "time limit of a call"),
    ("import time\ntime.sleep(30)", MANY, "fail", "time limit of a call"),
    ("def down(n):\n    return True", BOOLEAN, "pass", ""),
    # what is wrong
    ("def square(x):\n    return x + x", SQUARE, "fail", "a test failed: AssertionError"),
    ("def cube(x):\n    return x ** 3", SQUARE, "fail", "the program has no square"),
    ("this is no program", SQUARE, "fail", "exit status 1"),
    ("print(7)", DOUBLE, "fail", "wrong output at case 1 of 2"),
    ("print(6)", DOUBLE, "fail", "wrong output at case 2 of 2"),
    ("pass", DOUBLE, "fail", "wrong output"),
    ("def pair(a, b):\n    return [a[0], True]", PAIR, "fail", "wrong result"),
    # what does not end
    ("while True: pass", SQUARE, "fail", "time limit"),
    ("import time\ntime.sleep(60)", DOUBLE, "fail", "time limit"),
    (
        "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nwhile True: pass",
        SQUARE,
        "fail",
        "time limit",
    ),
    # what ends before its tests do
    ("import sys\nsys.exit(0)", SQUARE, "fail", "before its tests"),
    ("import os\nos._exit(0)", SQUARE, "fail", "before its tests"),
    ("import os\nos._exit(0)", PAIR, "fail", "before its function"),
    (
        "import atexit, os\natexit.register(os._exit, 0)\nraise SystemExit",
        SQUARE,
        "fail",
        "before its tests",
    ),
    (
        "import contextlib, os\nfor fd in range(3, 20):\n    with contextlib.suppress(OSError):\n"
        "        os.write(fd, b'[[1, 3]]' * 2)\nos._exit(0)",
        SQUARE,
        "fail",
        "before its tests",
    ),
    # what would do harm: other processes, signals, sockets, files, memory, output
    (f"import os\n{RIGHT}\nfor _ in range(6): os.fork()", SQUARE, "fail", "exit status 1"),
    (f"import subprocess\nsubprocess.run(['true'])\n{RIGHT}", SQUARE, "fail", "exit status 1"),
    (f"import os\nos.kill(os.getppid(), 0)\n{RIGHT}", SQUARE, "fail", "exit status 1"),
    (f"import socket\nsocket.socket()\n{RIGHT}", SQUARE, "fail", "exit status 1"),
    (f"import socket\nsocket.socket(socket.AF_UNIX)\n{RIGHT}", SQUARE, "fail", "exit status 1"),
    (f"open('mine', 'w').write('x')\n{RIGHT}", SQUARE, "fail", "exit status 1"),
    (f"import os\nos.mkdir('mine')\n{RIGHT}", SQUARE, "fail", "exit status 1"),
    (f"x = [0] * 10 ** 12\n{RIGHT}", SQUARE, "fail", "exit status"),
    (
        "import sys\nfor _ in range(40): sys.stdout.write('x' * 2 ** 20)",
        DOUBLE,
        "fail",
        "exit status",
    ),
    (f"open('/etc/hostname').read()\n{RIGHT}", SQUARE, "fail", "exit status 1"),
    # what is allowed
    (f"import os\nassert os.listdir('.') == []\n{RIGHT}", SQUARE, "pass", ""),
    (f"import os\nassert 'GRPO_TEST_SECRET' not in os.environ\n{RIGHT}", SQUARE, "pass", ""),
]


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRPO_TEST_SECRET", "1")
        args = {"seconds": 4.0, "total_seconds": 8.0}
        sandbox = Sandbox(JUDGE, [RuleSpec("code", "code_tests", args)], 30.0)
    yield sandbox
    sandbox.close()


@pytest.mark.parametrize(("program", "tests", "kind", "reason"), PROGRAMS)
def test_programs(
    sandbox: Sandbox, program: str, tests: dict[str, Any], kind: str, reason: str
) -> None:
    text = f"Here it is:\n```python\n{program}\n```\nIt works."
    (verdict,) = sandbox.score([Task(0, text, json.dumps({"tests": tests}))])
    assert (verdict.kind, verdict.reward) == (kind, float(kind == "pass")), verdict
    assert reason in verdict.reason


def test_a_file_of_the_user_stays_as_it_is(sandbox: Sandbox, tmp_path: Path) -> None:
    """A program cannot even see it; what it tries is not hidden by its own errors."""
    path = tmp_path / "kept"
    path.write_text("kept")
    path.chmod(0o644)
    attempts = [
        f"os.unlink({str(path)!r})",
        f"os.rename({str(path)!r}, {str(path) + '2'!r})",
        f"os.truncate({str(path)!r}, 0)",
        f"os.chmod({str(path)!r}, 0)",
        f"open({str(path)!r}, 'a').write('x')",
        f"os.close(os.open({str(path)!r}, os.O_RDONLY | os.O_TRUNC))",
        f"os.symlink({str(path)!r}, {str(path) + '3'!r})",
    ]
    tried = "\n".join(
        f"try:\n    {attempt}\nexcept (PermissionError, FileNotFoundError):\n    refused += 1"
        for attempt in attempts
    )
    program = f"import os\nrefused = 0\n{tried}\nassert refused == {len(attempts)}\n{RIGHT}"
    text = f"```\n{program}\n```"
    (verdict,) = sandbox.score([Task(0, text, json.dumps({"tests": SQUARE}))])
    assert verdict.kind == "pass", verdict
    assert path.read_text() == "kept"
    assert path.stat().st_mode & 0o777 == 0o644
    assert list(tmp_path.iterdir()) == [path]


def test_the_block_of_python_counts_and_text_without_one_fails(sandbox: Sandbox) -> None:
    reference = json.dumps({"tests": SQUARE})
    texts = [
        f"```\n{RIGHT}\n```\nBetter:\n```python\nno\n```",
        f"```python\n{RIGHT}\n```\nExample run:\n```\n6\n```",
        f"<think>```\nno\n```</think>```py\n{RIGHT}\n```",
        f"<think>```\n{RIGHT}\n```</think>",
        RIGHT,
        f"```python\n{RIGHT}",  # cut off at the limit of tokens
        "",
    ]
    verdicts = sandbox.score([Task(0, text, reference) for text in texts])
    assert [v.kind for v in verdicts] == ["fail", "pass", "pass", "fail", "fail", "fail", "fail"]


@pytest.mark.parametrize(
    "reference",
    [
        {},
        {"tests": {"kind": "essay"}},
        {"tests": {"kind": "stdin", "cases": "?"}},
        {"tests": {"kind": "stdin", "cases": code_tests.pack([])}},
    ],
)
def test_tests_that_cannot_be_read_are_an_error(
    sandbox: Sandbox, reference: dict[str, Any]
) -> None:
    (verdict,) = sandbox.score([Task(0, f"```\n{RIGHT}\n```", json.dumps(reference))])
    assert (verdict.kind, verdict.reward) == ("error", None)


def test_limits_that_are_no_times_are_refused() -> None:
    with pytest.raises(UserError, match="seconds=20"):
        resolve("code", "code_tests", {"seconds": 20, "total_seconds": 10})


def test_human_eval_tests_run_behind_the_program() -> None:
    question, reference = human_eval(HUMAN_EVAL)
    assert question == HUMAN_EVAL["prompt"]
    assert reference["tests"]["script"].endswith("check(root)\n")
