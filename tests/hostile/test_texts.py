"""Answers that would be run, if a grader or a library of its had a text evaluated as Python.

The grader's process knows the right answer, and judges the completions after this one: what runs
there has solved every task of the run.
"""

from __future__ import annotations

import os
from functools import lru_cache
from typing import Any

import pytest

from actors.sandbox.blame import completion_is_to_blame, next_task
from actors.verifiers import reasoning_gym
from actors.verifiers.registry import BUILTIN, resolve

MARK = "GRPO_LAMBDA_ANSWER_RAN"
_RUN = f"__import__('os').environ.update({MARK}='1')"
PAYLOADS = [
    _RUN,
    f"[{_RUN}]",
    f"({_RUN}, 1)[1]",
    f'sin("{_RUN}")',
    f'sqrt("{_RUN}") + 1',
    f'sympify("{_RUN}")',
    f'Symbol("{_RUN}") + Float("{_RUN}")',
    f"x + (lambda: {_RUN})()",
    f"x + (lambda y={_RUN}: y)",
    f"Symbol('x').__class__.__init__.__globals__['os'].environ.update({MARK}='1')",
    f'exec("import os; os.environ.update({MARK}=1)")',
    f"\N{FULLWIDTH LATIN SMALL LETTER E}xec(\"import os; os.environ['{MARK}'] = '1'\")",
    f"(exec)(\"import os; os.environ['{MARK}'] = '1'\")",
    f"x*__builtins__['exec'](\"import os; os.environ['{MARK}'] = '1'\")",
    f'eval(chr(95)+chr(95)+\'import__("os").environ.update({MARK}="1")\')',
    f"f'{{{_RUN}}}'",
    f"[y for y in [{_RUN}]]",
]
_NO_ANSWER = {"boxnet", "graph_color", "propositional_logic", "rubiks_cube", "rush_hour"}
"""Tasks whose entries store no answer."""


@lru_cache
def entries() -> dict[str, Any]:
    """An entry of every task of the package but `composite`, which is made of the others."""
    gym = reasoning_gym.import_reasoning_gym()
    from reasoning_gym.factory import DATASETS

    tasks = sorted(set(DATASETS) - {"composite"})
    return {task: gym.create_dataset(task, size=1, seed=3)[0] for task in tasks}


def of(task: str, entry: dict[str, Any]) -> dict[str, Any]:
    return {
        "task": task,
        "entry": reasoning_gym.encode_entry(entry),
        "answer": entry["answer"],
    }


def ran() -> bool:
    return os.environ.pop(MARK, None) is not None


def test_no_scorer_of_reasoning_gym_runs_an_answer() -> None:
    for task, entry in entries().items():
        for text in PAYLOADS:
            verdict = reasoning_gym.score(text, of(task, entry), extract="full")
            assert not ran(), (task, text)
            # The scorer of game_of_life_halting takes everything for the one or the other answer.
            assert verdict.kind == "fail" or task == "game_of_life_halting", (task, text)


def test_and_every_scorer_still_marks_the_stored_answer() -> None:
    for task, entry in entries().items():
        if task not in _NO_ANSWER:
            answer = str(entry["answer"])
            assert reasoning_gym.score(answer, of(task, entry), extract="full").kind == "pass", task


REFERENCES: dict[str, dict[str, Any]] = {
    "reasoning_gym": {"task": "simple_integration"},
    "math_answer": {"answer": "x^2 + 1"},
    "format_rules": {},
    "choice": {"answer": "B"},
    "rubric": {"answer": "B"},
    "code_tests": {"tests": {"kind": "script", "setup": "", "script": "assert f(1) == 2"}},
}
ARGS: dict[str, dict[str, Any]] = {
    "format_rules": {"forbidden": ["import|chr|lambda|exec|environ"]},
    "rubric": {"criteria": [{"text": "It is {answer}.", "pattern": "^{answer}$"}]},
}


# One asks a model, one reads no text, and one gives a wrong answer something.
@pytest.mark.parametrize("name", sorted(set(BUILTIN) - {"llm_judge", "column", "right_prefix"}))
def test_no_grader_runs_a_text_and_each_blames_the_completion(name: str) -> None:
    rule = resolve(name, name, ARGS.get(name, {}))
    reference = REFERENCES[name]
    if name == "reasoning_gym":
        reference = of(reference["task"], entries()[reference["task"]])
    for text in PAYLOADS:
        for shape in ("{}", r"so \boxed{{{}}}", "<answer>{}</answer>", "the answer is ${}$."):
            next_task()
            verdict = rule.judge(shape.format(text), reference, "stop", "")
            assert verdict.kind == "fail", (text, verdict)
            assert not ran(), text
            # code_tests needs a process before it can blame; without a program it is done.
            assert completion_is_to_blame() or name == "code_tests", text


@pytest.mark.parametrize("task", ["countdown", "puzzle24"])
def test_numbers_that_a_scorer_does_not_see_make_no_answer(task: str) -> None:
    entry = entries()[task]
    numbers = entry["metadata"]["numbers"]
    target = entry["metadata"].get("target", 24)
    missing = target - sum(numbers)
    plain = "+".join(map(str, numbers))
    for hidden in (f"{missing:#x}", f"{missing}e0", "+".join(["1_0"] * 3), f"{missing}.0"):
        answer = f"{plain}+({hidden})"
        assert reasoning_gym.score(answer, of(task, entry), extract="full").kind == "fail", answer
    if task == "puzzle24":  # whose scorer asks for four numbers, whichever
        found = reasoning_gym.score("6*4*1*1", of(task, entry), extract="full")
        assert sorted(numbers) != [1, 1, 4, 6]
        assert found.kind == "fail"
