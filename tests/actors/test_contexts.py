"""Contexts of a scorer: what is in them, where the hole is, and what cannot break their frame."""

from __future__ import annotations

import json
from typing import Any

import pytest
from byte_tokenizers import byte_tokenizer

from actors.data.chat import Template
from actors.data.contexts import Contexts, with_feedback
from actors.data.schemas import Row
from common.config.algorithm import AdvantageConfig
from common.config.contexts import HOLE
from common.config.sections import DataConfig


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return byte_tokenizer()


def row(question: str = "1 + 1 =", answer: Any = "2", solution: str | None = None) -> Row:
    reference = json.dumps({"prompt": question, "answer": answer})
    return Row(question, reference, solution, None, "line 1")


def contexts(tokenizer: Any, name: Any, text: str | None = None) -> Contexts:
    config = AdvantageConfig(context=name, context_template=text)
    return Contexts.of_scorer(Template(DataConfig(), tokenizer), config)


def said(tokenizer: Any, ids: tuple[int, ...] | list[int]) -> str:
    return "".join("(hole)" if i == HOLE else tokenizer.decode([i]) for i in ids)


def framed(tokenizer: Any, text: str) -> str:
    template = Template(DataConfig(), tokenizer)
    return tokenizer.decode(template.encode_asked([text])[0])


def test_answers_and_solutions_stand_where_the_template_says(tokenizer: Any) -> None:
    text = "{prompt} It is {answer}."
    for answer, shown in (("2", "2"), (2, "2"), (["a", 1], '["a", 1]')):
        ids = contexts(tokenizer, "answer", text).of(row(answer=answer))
        assert said(tokenizer, ids) == framed(tokenizer, f"1 + 1 = It is {shown}.")
    made = contexts(tokenizer, "solution", "{solution}|{prompt}")
    assert said(tokenizer, made.of(row(solution="count"))) == framed(tokenizer, "count|1 + 1 =")
    assert said(tokenizer, made.of(row())) == framed(tokenizer, "2|1 + 1 =")
    assert made.of(row(answer=None)) == (HOLE,)


def test_braces_of_a_question_are_text(tokenizer: Any) -> None:
    ids = contexts(tokenizer, "answer", "{prompt} is {answer}").of(row("{answer}", "{prompt}"))
    assert said(tokenizer, ids) == framed(tokenizer, "{answer} is {prompt}")


def test_a_sibling_has_a_hole_and_feedback_fills_one(tokenizer: Any) -> None:
    text = "{prompt} Told: {feedback} Again."
    ids = contexts(tokenizer, "feedback", text).of(row())
    around = framed(tokenizer, "1 + 1 = Told: (hole) Again.")
    assert said(tokenizer, ids) == around
    filled = with_feedback(ids, "wrong", tokenizer)
    assert said(tokenizer, filled) == around.replace("(hole)", "wrong")
    assert with_feedback(ids, "", tokenizer) == list(ids)
    assert with_feedback((), "wrong", tokenizer) == []


def test_what_an_environment_says_becomes_no_control_token(tokenizer: Any) -> None:
    ids = contexts(tokenizer, "feedback", "{prompt} {feedback}").of(row())
    filled = with_feedback(ids, "stop<s>", tokenizer)
    assert tokenizer.bos_token_id not in filled
    assert "stop<s>" in said(tokenizer, filled)
