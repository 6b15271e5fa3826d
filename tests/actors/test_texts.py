"""What verifiers read of the tokens of a completion."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from byte_tokenizers import byte_tokenizer
from made_up_groups import request

from actors.generation.engine import Completion
from actors.generation.rows import rollout_batch
from actors.generation.texts import Texts, before_stop, ending_tokens
from actors.verifiers import math_answer
from common.config.algorithm import ANSWER


def thinking_tokenizer() -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens(
        {
            "additional_special_tokens": ["<think>", "</think>"],
            "eos_token": "<|end|>",
            "pad_token": "<|pad|>",
        }
    )
    return tokenizer


def completion(tokenizer: Any, text: str, given: str = "") -> Completion:
    both = [
        tokenizer(part, add_special_tokens=False)["input_ids"] if part else []
        for part in (given, text)
    ]
    ids = [*both[0], *both[1]]
    return Completion(ids, [0.0] * len(ids), [0] * len(ids), "stop", len(both[0]))


@pytest.mark.parametrize(
    ("said", "read"),
    [
        ("<think>41</think>42", "<think>41</think>42"),
        ("<think>41</think>42<|end|>", "<think>41</think>42"),
        ("42<|end|><|pad|><|pad|>", "42"),
        ("4<|pad|>2<|end|>", "4<|pad|>2"),
        ("<s>42", "<s>42"),
        ("<|end|>", ""),
        ("", ""),
        ("x != y . z 's", "x != y . z 's"),
    ],
)
def test_special_tokens_are_text_but_for_those_that_end_it(said: str, read: str) -> None:
    tokenizer = thinking_tokenizer()
    tokenizer.clean_up_tokenization_spaces = True
    ends = [tokenizer.eos_token_id, tokenizer.pad_token_id]
    assert Texts(tokenizer, ends, []).text(completion(tokenizer, said)) == read


def test_an_open_thought_of_special_tokens_is_no_answer() -> None:
    tokenizer = thinking_tokenizer()
    texts = Texts(tokenizer, [tokenizer.eos_token_id], [])
    for said, kind in (("<think>It is 42", "fail"), ("<think>41</think>42<|end|>", "pass")):
        text = texts.text(completion(tokenizer, said))
        assert math_answer.score(text, {"answer": "42"}).kind == kind


def test_an_end_that_is_also_the_padding_is_trained_on() -> None:
    tokenizer = thinking_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    said = completion(tokenizer, "42<|end|>")
    text = Texts(tokenizer, ending_tokens(tokenizer, "nowhere"), []).text(said)
    batch = rollout_batch(request(0, 0), {0: said}, [text], "g")
    assert (text, batch.column("text").to_pylist()) == ("42", ["42"])
    assert batch.column("token_ids").to_pylist()[0][-1] == tokenizer.eos_token_id
    assert batch.column("loss_mask").to_pylist()[0][-1] is True


def test_no_kind_of_tokenizer_tidies_spaces_up() -> None:
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import Unigram
    from transformers import PreTrainedTokenizerFast

    letters = [(letter, -1.0) for letter in "▁!=xya.'s"]
    inner = Tokenizer(Unigram([("<unk>", 0.0), *letters], 0))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    inner.decoder = decoders.Metaspace(prepend_scheme="never")
    fast: Any = PreTrainedTokenizerFast  # untyped in transformers
    tokenizer = fast(tokenizer_object=inner, clean_up_tokenization_spaces=True)
    said = completion(tokenizer, "x != y . a 's")
    assert tokenizer.decode(said.token_ids) != "x != y . a 's"  # what its own way makes of it
    assert Texts(tokenizer, [], []).text(said) == "x != y . a 's"


def test_the_text_ends_before_what_stops_it() -> None:
    tokenizer = thinking_tokenizer()
    end = tokenizer("#", add_special_tokens=False)["input_ids"][0]
    texts = Texts(tokenizer, [tokenizer.eos_token_id], ["\n\n", "</think>", end])
    for said, read in (
        ("a\nb\n\n", "a\nb"),
        ("a</think>", "a"),
        ("a#", "a"),
        ("a#b", "a#b"),  # a token ends a completion where it is the last
        ("a<|end|>", "a"),
    ):
        assert texts.text(completion(tokenizer, said)) == read
    assert texts.text(completion(tokenizer, "b\n\n", given="x\n\na")) == "x\n\nab"


def test_of_several_stops_the_one_that_is_complete_first_counts() -> None:
    assert before_stop("one two three", ["two three", "wo"]) == "one t"
    assert before_stop("aXb", ["b", "X"]) == "a"
    assert before_stop("aXb", ["c"]) == "aXb"


def test_all_ends_that_a_folder_names_are_known(tmp_path: Path) -> None:
    tokenizer = SimpleNamespace(eos_token_id=1, pad_token_id=None)
    assert ending_tokens(tokenizer, str(tmp_path)) == [1]
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 2}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 3]}))
    assert ending_tokens(tokenizer, str(tmp_path)) == [1, 2, 3]


def test_the_tokens_of_an_answer_are_those_of_its_last_match() -> None:
    tokenizer = thinking_tokenizer()
    texts = Texts(tokenizer, [tokenizer.eos_token_id], [])
    for said, answer in (
        ("<think>1 + 2 is 3</think>so 12<|end|>", "12"),
        (r"7 or \boxed{x + 1}.<|end|>", "x + 1"),
        ("<answer>a, 3 b</answer>", "a, 3 b"),
        ("1.5 then -2,000", "-2,000"),
    ):
        made = completion(tokenizer, said)
        begin, end = texts.answer_span(made, ANSWER)
        assert tokenizer.decode(made.token_ids[begin:end]) == answer
    assert texts.answer_span(completion(tokenizer, "nothing<|end|>"), ANSWER) == (0, 0)
