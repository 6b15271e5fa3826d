"""Does appending give what the template would write? Tried on small conversations before a run.

An episode is appended to and never rendered again: prompt, what was sampled, what stands behind
it, what was sampled, and so on. For a role that speaks behind the assistant, `difference` renders
whole conversations and walks through their tokens: each part that was given must stand there, and
between two parts what the assistant said. Turns are short and long, whole and cut, with calls of
tools and with thoughts.

A template that leaves the thoughts of earlier turns out differs from every episode in which a
policy thinks. That difference is told from all others, since a run may accept it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from actors.rendering.frame import PROBES, Frame, call_id
from actors.verifiers.thoughts import thought_tags, whole_answer, without_thoughts
from common.errors import first_line

Message = dict[str, Any]
_SAID = (
    "Let me see.",
    "First 12 + 7 = 19, then\n\n    {19} \N{MULTIPLICATION SIGN} 2 = 38; so it is \\boxed{38}",
    "\N{LATIN CAPITAL LETTER U WITH DIAERESIS}ber alles? \N{GRINNING FACE} [no](x)",
)
_TOLD = ("result: 1904", 'two lines\n\n{"a": [1, "b"]}', "\N{EN DASH} and a last word")
_ASKED = "What is 12 + 7?"


class Difference(NamedTuple):
    """Where the template's rendering parts from what was appended."""

    message: str
    thoughts_alone: bool
    """They are the same but for thoughts and white space."""


@dataclass(frozen=True)
class Script:
    """A conversation: turns of the assistant, and what is told behind each."""

    name: str
    turns: tuple[Message, ...]
    told: tuple[tuple[Message, ...], ...]


def difference(frame: Frame, role: str) -> Difference | None:
    """The first difference for messages of `role` behind the assistant; the gravest kind first."""
    found = None
    for script in scripts(frame, role):
        try:
            wrong = _walk(frame, script)
        except Exception as error:  # a template is a program of the model's; it may raise anything
            return Difference(f"{script.name}: {first_line(error)}", False)
        if wrong is not None and not wrong.thoughts_alone:
            return wrong
        found = found or wrong
    return found


def scripts(frame: Frame, role: str) -> Iterator[Script]:
    """Conversations in which `role` speaks behind the assistant."""
    tags, begun = thought_tags(frame.template.source), frame.generation()
    kinds = ("", "thoughts") if tags else ("",)
    if whole_answer("", begun):  # the policy begins inside a thought
        kinds = ("thoughts",)
    elif thought_tags(begun):  # or behind an empty one
        kinds = ("",)
    calls = role == "tool" and frame.form is not None
    for kind in kinds:
        thought = f"{tags[0][0]}\nI wonder.\n{tags[0][1]}\n\n" if kind else ""
        named = f" with {kind}" if kind else ""
        told = [[{"role": role, "content": text}] for text in _TOLD]
        if not calls:
            yield _script(f"three turns{named}", [_says(thought + one) for one in _SAID], told)
            for part in (3, 2):
                cut = [_says(thought + one[: len(one) // part].rstrip()) for one in _SAID]
                yield _script(f"three cut turns{named}", cut, told)
            yield _script(f"one turn{named}", [_says(thought + _SAID[1])], told[1:2])
        else:
            yield from _with_calls(frame, thought, named)


def _with_calls(frame: Frame, thought: str, named: str) -> Iterator[Script]:
    assert frame.form is not None
    turns, told = [], []
    for number, text in enumerate(_TOLD):
        ids = [call_id(2 * number + i) for i in range(len(PROBES))]
        turn = frame.form.message([(*call, id_) for call, id_ in zip(PROBES, ids, strict=True)])
        turns.append(turn | ({"content": thought} if thought else {}))
        made = [call["id"] for call in turn["tool_calls"]]
        names = [call["function"]["name"] for call in turn["tool_calls"]]
        told.append(
            [
                {"role": "tool", "content": text, "name": name, "tool_call_id": id_}
                for name, id_ in zip(names, made, strict=True)
            ]
        )
    yield _script(f"three calls of tools{named}", turns, told)
    yield _script(f"one call of a tool{named}", turns[:1], told[:1])


def _script(name: str, turns: Sequence[Message], told: Sequence[Sequence[Message]]) -> Script:
    return Script(name, tuple(turns), tuple(tuple(messages) for messages in told))


def _says(text: str) -> Message:
    return {"role": "assistant", "content": text}


def _walk(frame: Frame, script: Script) -> Difference | None:
    """Walk through the tokens of the whole conversation, part by part."""
    template = frame.template
    messages: list[Message] = [{"role": "user", "content": _ASKED}]
    appended = template.rendered(messages, generation=True)
    given = [template.encode_asked([messages])[0]]
    said: list[str] = []
    for turn, told in zip(script.turns, script.told, strict=True):
        said.append(_sampled(frame, messages, turn))
        appended += said[-1] + frame.behind_text(told)
        given.append(frame.behind(told))
        messages += [turn, *told]
    text = template.rendered(messages, generation=True)
    wrong = frame.parted(template.encode([text])[0], given, said)
    if wrong is None:
        return None
    alone = _bare(appended) == _bare(text)
    return Difference(f"{script.name}: {wrong}", alone)


def _sampled(frame: Frame, before: list[Message], turn: Message) -> str:
    """What a policy would have sampled to say `turn`."""
    if "tool_calls" in turn:
        said = frame.said(before, turn)
        return said if turn["content"] else without_thoughts(said)  # some write an empty one
    opened = whole_answer("", frame.template.rendered(before, generation=True))
    return turn["content"].removeprefix(opened.strip()).lstrip() if opened else turn["content"]


def _bare(text: str) -> str:
    return "".join(without_thoughts(text).split())
