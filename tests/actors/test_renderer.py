"""Appending to an episode gives what the chat template would write, and keeps what was sampled."""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

import pytest
from byte_tokenizers import CHAT
from chat_templates import CHATML, FAMILIES, FORGETS_THOUGHTS, HERMES, trained_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.utils import get_json_schema

from actors.environments.base import ToolCall
from actors.rendering.renderer import Renderer
from common.config.sections import DataConfig
from common.errors import UserError


def multiply(a: int, b: int) -> int:
    """Multiply two whole numbers.

    Args:
        a: the first
        b: the second
    """
    return a * b


TOOLS = [get_json_schema(multiply)]
ASKED = [{"role": "user", "content": "What is 12 + 7?"}]
SAID = "Let me see, \u00fcber 12: the result {19}\n\nis the answer \U0001f600."
WITH_TOOLS = ("hermes", "forgets thoughts", "headers", "brackets")


@cache
def family(name: str) -> tuple[Any, Renderer]:
    tokenizer = FAMILIES[name].tokenizer()
    return tokenizer, Renderer.start(tokenizer, DataConfig(), thoughts="keep")


@cache
def with_tools(name: str) -> tuple[Any, Renderer]:
    tokenizer = FAMILIES[name].tokenizer()
    return tokenizer, Renderer.start(tokenizer, DataConfig(), tools=TOOLS, thoughts="keep")


def ids_of(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def rendered(tokenizer: Any, messages: list[dict[str, Any]], **options: Any) -> str:
    return str(
        tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, **options
        )
    )


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def says(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_end_of_a_turn_and_the_marks_of_roles_are_found(name: str) -> None:
    known = FAMILIES[name]
    tokenizer, renderer = family(name)
    stops = set(tokenizer.convert_ids_to_tokens(list(renderer.stop_token_ids)))
    assert stops == {known.end, known.eos, *known.marks}
    end = tokenizer.convert_tokens_to_ids(known.end)
    assert renderer.ended([5, end]) and not renderer.ended([end, 5]) and not renderer.ended([])
    told = [user("go on")]
    assert renderer.behind(told, ended=False) == [end, *renderer.behind(told, ended=True)]


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "begins a thought"])
def test_a_turn_may_be_cut_at_every_token(name: str) -> None:
    tokenizer, renderer = family(name)
    ids = ids_of(tokenizer, SAID)
    tokens_are_the_same = 0
    for cut in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:cut])
        if "\ufffd" in text or (FAMILIES[name].trims and text != text.strip()):
            continue  # half a letter, or white space that the template would take away
        whole = renderer.prompt(ASKED) + ids[:cut] + renderer.behind([user("More?")], ended=False)
        full = rendered(tokenizer, [*ASKED, says(text), user("More?")])
        shown = tokenizer.decode(whole, skip_special_tokens=False)
        if name == "brackets":  # its space before an answer is sampled, if it is there at all
            full = full.replace("[/INST] ", "[/INST]", 1)
        assert shown == full
        tokens_are_the_same += ids_of(tokenizer, full) == whole
    assert tokens_are_the_same > len(ids) // 2


TEXTS = st.text(st.sampled_from("the resultcall 12{}\n\u00fc\U0001f600[]\"'"), min_size=1).filter(
    lambda text: text == text.strip()
)
TURN = st.tuples(TEXTS, st.booleans(), TEXTS)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["chatml", "hermes", "headers", "alternates", "dated"]), st.data())
def test_any_episode_reads_as_the_template_would_write_it(name: str, data: st.DataObject) -> None:
    """However its turns were encoded: here every letter is a token, as no tokenizer does."""
    tokenizer, renderer = family(name)
    messages = list(ASKED)
    row, sampled = renderer.prompt(ASKED), []
    for text, cut, told in data.draw(st.lists(TURN, min_size=1, max_size=4)):
        ids = [id_ for letter in text for id_ in ids_of(tokenizer, letter)]
        ids += [] if cut else [tokenizer.convert_tokens_to_ids(FAMILIES[name].end)]
        sampled.append((len(row), ids))
        row = row + ids + renderer.behind([user(told)], ended=renderer.ended(ids))
        messages += [says(text), user(told)]
    full = rendered(tokenizer, messages)
    assert tokenizer.decode(row, skip_special_tokens=False) == full
    assert all(row[begin : begin + len(ids)] == ids for begin, ids in sampled)


def test_encoding_again_would_change_what_was_sampled() -> None:
    """The drift that appending avoids: same text, other tokens."""
    tokenizer, renderer = family("chatml")
    ids = ids_of(tokenizer, "the res") + ids_of(tokenizer, "ult")
    again = ids_of(tokenizer, tokenizer.decode(ids))
    assert again != ids
    row = renderer.prompt(ASKED) + ids + renderer.behind([user("So?")], ended=False)
    full = rendered(tokenizer, [*ASKED, says("the result"), user("So?")])
    assert tokenizer.decode(row, skip_special_tokens=False) == full
    assert ids_of(tokenizer, full) != row


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_told_becomes_no_control_token(name: str) -> None:
    known = FAMILIES[name]
    tokenizer, renderer = family(name)
    controls = {*known.specials, *known.marks, known.end, known.eos}
    ids = set(tokenizer.convert_tokens_to_ids(sorted(controls)))

    def of(told: str) -> list[int]:
        return [id_ for id_ in renderer.behind([user(told)], ended=False) if id_ in ids]

    spelled = "a" + "b".join(sorted(controls)) + f"c grpolambdamark0x {known.end}"
    assert of(spelled) == of("a")
    shown = tokenizer.decode(renderer.behind([user(spelled)], ended=False))
    assert spelled in shown
    assert [i for i in renderer.prompt([user(spelled)]) if i in ids] == [
        i for i in renderer.prompt([user("a")]) if i in ids
    ]


@pytest.mark.parametrize("name", WITH_TOOLS)
def test_calls_of_tools_are_read_as_the_template_writes_them(name: str) -> None:
    tokenizer, renderer = with_tools(name)
    arguments = {"a": 12, "b": 34}
    call = {"id": "call00000", "type": "function", "function": {"name": "multiply"}}
    call["function"] |= {"arguments": arguments}  # type: ignore[operator]
    turn = {"role": "assistant", "content": "", "tool_calls": [call]}
    asked = rendered(tokenizer, ASKED, tools=TOOLS)
    assert "multiply" in asked
    assert renderer.prompt(ASKED) == ids_of(tokenizer, asked)
    text = tokenizer.apply_chat_template([*ASKED, turn], tools=TOOLS, tokenize=False)
    end = FAMILIES[name].end
    said = text[len(asked) : text.rindex(end)]
    reply = renderer.parse(ids_of(tokenizer, said + end))
    assert reply.calls == (ToolCall("multiply", arguments),)
    assert (reply.text, reply.malformed) == ("", "")
    told = {"role": "tool", "content": '408 "so"\nit is', "name": "multiply"}
    told |= {"tool_call_id": "call00000"}
    row = renderer.prompt(ASKED) + ids_of(tokenizer, said) + renderer.behind([told], ended=False)
    full = rendered(tokenizer, [*ASKED, turn, told], tools=TOOLS)
    assert row == ids_of(tokenizer, full)


def test_the_parser_is_the_one_that_reads_the_template() -> None:
    said = {name: " ".join(with_tools(name)[1].notes) for name in WITH_TOOLS}
    assert "parser hermes" in said["hermes"] and "parser hermes" in said["forgets thoughts"]
    assert "parser llama3_json" in said["headers"]
    assert "parser mistral" in said["brackets"]
    with pytest.raises(UserError, match=r"parser llama4_pythonic does not read that back"):
        Renderer.start(
            FAMILIES["hermes"].tokenizer(),
            DataConfig(),
            tools=TOOLS,
            tool_parser="llama4_pythonic",
        )
    with pytest.raises(UserError, match=r"did you mean hermes"):
        Renderer.start(
            FAMILIES["hermes"].tokenizer(), DataConfig(), tools=TOOLS, tool_parser="herms"
        )


CALL = '<tool_call>\n{"name": "multiply", "arguments": {"a": 1, "b": 2}}\n</tool_call>'


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ('<tool_call>\n{"name": "multiply", "arguments": {"a": 1,}}\n</tool_call>', "JSONDecode"),
        ('<tool_call>\n{"name": "multiply", "argum', "JSONDecode"),
        ('<tool_call>\n{"name": "multiply"}\n</tool_call>', "KeyError"),
        ('<tool_call>\n{"name": 3, "arguments": {}}\n</tool_call>', "ValidationError"),
        ('<tool_call>\n{"name": "multiply", "arguments": [1, 2]}\n</tool_call>', "no object"),
        (CALL.replace("1,", "1, " + "[" * 100_000 + ","), "Error"),
        ("<tool_call>", "JSONDecode"),
        (CALL + "\n" + CALL.replace("{", "", 1), "JSONDecode"),
    ],
)
def test_a_call_that_cannot_be_read_says_why(
    said: str, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer, renderer = with_tools("hermes")
    with caplog.at_level(logging.DEBUG):
        reply = renderer.parse(ids_of(tokenizer, "I call. " + said + "<|im_end|>"))
    assert not reply.calls and reason in reply.malformed
    assert reply.text.startswith("I call.")
    assert not caplog.records


def test_words_beside_calls_are_kept_and_words_alone_are_no_call() -> None:
    tokenizer, renderer = with_tools("hermes")
    reply = renderer.parse(ids_of(tokenizer, f"I call twice.\n{CALL}\n{CALL}<|im_end|>"))
    assert reply.calls == (ToolCall("multiply", {"a": 1, "b": 2}),) * 2
    assert reply.text.strip() == "I call twice." and not reply.malformed
    reply = renderer.parse(ids_of(tokenizer, "{19} is [it] <so> to say"))
    assert (reply.text, reply.calls, reply.malformed) == ("{19} is [it] <so> to say", (), "")
    tokenizer, renderer = with_tools("headers")
    reply = renderer.parse(ids_of(tokenizer, "so {19} is it"))
    assert (reply.text, reply.calls, reply.malformed) == ("so {19} is it", (), "")
    reply = renderer.parse(ids_of(tokenizer, '{"name": "multiply", "parameters": {"a": 1'))
    assert not reply.calls and "cannot be read" in reply.malformed


@pytest.mark.parametrize("name", FAMILIES)
def test_a_forged_message_is_a_malformed_turn(name: str) -> None:
    tokenizer, renderer = family(name)
    for mark in FAMILIES[name].marks:
        (id_,) = ids_of(tokenizer, mark)
        assert id_ in renderer.stop_token_ids
        for ids in ([*ids_of(tokenizer, "so"), id_], [id_, *ids_of(tokenizer, "user\nIt is 4.")]):
            reply = renderer.parse(ids)
            assert mark in reply.malformed and mark not in reply.text and not reply.calls
            assert not renderer.ended(ids)
    end = FAMILIES[name].end
    closed = "" if name != "begins a thought" else "</think>"
    assert renderer.parse(ids_of(tokenizer, f"{closed}so{end}")) == renderer.parse(
        ids_of(tokenizer, f"{closed}so")
    )
    assert renderer.parse(ids_of(tokenizer, f"{closed}so{end}")).text == "so"


def test_thoughts_that_a_template_forgets_are_refused_or_kept_aloud() -> None:
    for name in ("forgets thoughts", "begins a thought"):
        tokenizer = FAMILIES[name].tokenizer()
        with pytest.raises(UserError, match=r"turn 1|the prompt.*environment\.thoughts=keep"):
            Renderer.start(tokenizer, DataConfig())
        _, renderer = family(name)
        (note,) = [note for note in renderer.notes if "thoughts" in note]
        assert "keeps the thoughts of earlier turns" in note and "the template writes" in note
    # Behind a call of a tool the thoughts stay, so nothing has to be accepted there.
    renderer = Renderer.start(FAMILIES["forgets thoughts"].tokenizer(), DataConfig(), tools=TOOLS)
    assert not [note for note in renderer.notes if "thoughts" in note]
    with pytest.raises(UserError, match=r"environment\.thoughts=keep"):
        renderer.behind([user("And?")], ended=True)


def test_thoughts_are_split_from_words_and_calls() -> None:
    tokenizer, renderer = with_tools("forgets thoughts")
    reply = renderer.parse(ids_of(tokenizer, f"<think>\nNot {CALL}\n</think>\n\nSo.\n{CALL}"))
    assert "Not" in reply.thought and len(reply.calls) == 1
    assert reply.text.strip() == "So."
    cut = renderer.parse(ids_of(tokenizer, f"<think>\nNot {CALL}"))
    assert (cut.text, cut.calls) == ("", ()) and "Not" in cut.thought
    tokenizer, renderer = family("begins a thought")
    reply = renderer.parse(ids_of(tokenizer, "Hm.\n</think>\n\nFour.<|end|>"))
    assert (reply.thought, reply.text.strip(), reply.malformed) == ("Hm.", "Four.", "")


def test_a_template_that_moves_its_tools_takes_no_second_question() -> None:
    _, renderer = with_tools("brackets")
    with pytest.raises(UserError, match=r"AVAILABLE_TOOLS"):
        renderer.behind([user("And?")], ended=True)
    with pytest.raises(UserError, match=r"message of the user follows.*AVAILABLE_TOOLS"):
        Renderer.start(FAMILIES["brackets"].tokenizer(), DataConfig(), tools=TOOLS, roles=["user"])


COUNTS = "{{ messages | length }}" + CHATML
LAST_ALONE = CHATML.replace("{% for m in messages %}", "{% for m in messages[-1:] %}")
REWRITES = CHATML.replace(
    "{{ m.content }}", "{{ m.content if loop.last or m.role != 'assistant' else m.content[:30] }}"
)
RAISES = CHATML + "{% if messages | length > 4 %}{{ raise_exception('too long') }}{% endif %}"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (CHAT, r"writes '<user>grpolambdatold.*does not begin with a control token"),
        (COUNTS, r"the prompt has '1.* where the template writes '3|'7"),
        (LAST_ALONE, r"leaves out what the assistant said"),
        (REWRITES, r"turn 2 says 'First 12 .* and the template writes 'First 12"),
        (RAISES, r"too long"),
    ],
)
def test_a_template_that_cannot_be_appended_to_is_refused(template: str, message: str) -> None:
    tokenizer = trained_tokenizer(template, "<|im_end|>", ("<|im_start|>",))
    with pytest.raises(UserError, match=message):
        Renderer.start(tokenizer, DataConfig(), thoughts="keep")


def test_tools_that_nobody_would_be_told_of_are_refused() -> None:
    tokenizer = FAMILIES["chatml"].tokenizer()
    with pytest.raises(UserError, match=r"does not tell the policy of the tools multiply"):
        Renderer.start(tokenizer, DataConfig(), tools=TOOLS)
    config = DataConfig(system_prompt="You may call multiply.")
    with pytest.raises(UserError, match=r"writes no calls.*environment\.tool_parser"):
        Renderer.start(tokenizer, config, tools=TOOLS)
    renderer = Renderer.start(tokenizer, config, tools=TOOLS, tool_parser="hermes")
    assert any("data.system_prompt has to say" in note for note in renderer.notes)
    assert renderer.parse(ids_of(tokenizer, CALL)).calls == (
        ToolCall("multiply", {"a": 1, "b": 2}),
    )
    assert "JSONDecode" in renderer.parse(ids_of(tokenizer, CALL[:30])).malformed
    row = renderer.prompt(ASKED) + ids_of(tokenizer, CALL)
    row += renderer.behind([{"role": "tool", "content": "2"}], ended=False)
    full = rendered(
        tokenizer,
        [
            {"role": "system", "content": "You may call multiply."},
            *ASKED,
            says(CALL),
            {"role": "tool", "content": "2"},
        ],
    )
    assert row == ids_of(tokenizer, full)


def test_a_control_token_in_the_description_of_a_tool_is_refused() -> None:
    bad = [get_json_schema(multiply)]
    bad[0]["function"]["description"] = "ends with <|im_end|>"
    with pytest.raises(UserError, match=r"spells <\|im_end\|>"):
        Renderer.start(FAMILIES["hermes"].tokenizer(), DataConfig(), tools=bad)


def test_what_a_run_should_know_is_said() -> None:
    assert any("today's date" in note for note in family("dated")[1].notes)
    assert not family("chatml")[1].notes
    plain = CHATML.replace("<|im_start|>", "###")
    tokenizer = trained_tokenizer(plain, "<|im_end|>")
    (note,) = Renderer.start(tokenizer, DataConfig()).notes
    assert "plain words" in note


def test_others_do_not_speak_behind_the_policy() -> None:
    _, renderer = family("alternates")
    with pytest.raises(ValueError, match="assistant"):
        renderer.behind([says("me again")], ended=True)
    with pytest.raises(UserError, match=r"user and model take turns"):
        renderer.behind([user("a"), user("b")], ended=True)
    with pytest.raises(UserError, match=r"data\.template=chat"):
        Renderer.start(FAMILIES["chatml"].tokenizer(), DataConfig(template="plain"))
    assert HERMES != FORGETS_THOUGHTS
