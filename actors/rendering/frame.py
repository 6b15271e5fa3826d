"""What a chat template writes around the turns of an episode, found out by asking it.

A template is a program, so it is given small conversations and what it writes is looked at: the
token that ends a turn of the assistant, the tokens that mark a role, how a call of a tool is
written, and what stands between a turn of the assistant and the next.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from actors.data.chat import Conversation, Template
from actors.verifiers.thoughts import thought_tags
from common.errors import UserError

SAID = "grpolambdasaid"
"""What the assistant says in the conversations that a template is given."""
ASKED, TOLD = "grpolambdaasked", "grpolambdatold"
PROBES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("look_up", {"word": 'a "quoted" word, {x}', "count": 12}),
    ("add_up", {"a": 1, "b": 2}),
)
"""Calls that a template is asked to write: what must be escaped, and more than one."""
_SHOWN = 60
"""Characters of a difference that are quoted."""


@dataclass(frozen=True)
class CallForm:
    """How a template wants to be given the calls of tools."""

    content: str | None
    """Content of an assistant that says nothing besides."""
    as_text: bool
    """Arguments are a text of JSON, not a dictionary."""
    parallel: bool
    """A turn may hold more than one."""

    def message(self, calls: Sequence[tuple[str, dict[str, Any], str]]) -> dict[str, Any]:
        """A turn of the assistant with calls: name, arguments, id."""
        kept = calls if self.parallel else calls[-1:]
        return {
            "role": "assistant",
            "content": self.content,
            "tool_calls": [
                {
                    "id": id_,
                    "type": "function",
                    "function": {
                        "name": name,
                        "arguments": json.dumps(arguments) if self.as_text else arguments,
                    },
                }
                for name, arguments, id_ in kept
            ],
        }


_FORMS = [
    CallForm(content, as_text, parallel)
    for parallel in (True, False)
    for content in ("", None)
    for as_text in (False, True)
]


def call_id(number: int) -> str:
    """An id of a call as every template takes it: some want nine letters or digits."""
    return f"call{number:05}"


def filled(messages: Conversation) -> list[dict[str, Any]]:
    """Messages with the names and ids that templates ask of results of tools."""
    results = 0
    whole: list[dict[str, Any]] = []
    for message in messages:
        known: dict[str, Any] = {}
        if message["role"] == "tool":
            known = {"name": PROBES[0][0], "tool_call_id": call_id(results)}
            results += 1
        whole.append(known | dict(message))
    return whole


class Frame:
    """The end of a turn, the marks of roles, and what comes behind a turn.

    Raises: `UserError` where the template ends the assistant's turn with no token.
    """

    def __init__(self, template: Template, tokenizer: Any, tools: bool) -> None:
        self.template = template
        self._tokenizer = tokenizer
        self._tokens = _control_tokens(tokenizer)
        self._spelled = re.compile(
            "|".join(map(re.escape, sorted(self._tokens, key=len, reverse=True))) or r"(?!)"
        )
        self.end = self._end()
        self.end_id = self._tokens[self.end]
        self.form = self._form() if tools else None
        marks = self._marks()
        template.guard([*marks, self.end])
        self.marks = {self._tokens[mark]: mark for mark in marks}
        """Tokens that mark a role, by id: no reply may hold one."""
        eos = tokenizer.eos_token_id
        self.ends = tuple(sorted({self.end_id} | ({eos} if eos is not None else set())))

    def behind(self, messages: Conversation) -> list[int]:
        """Token ids from the end of a turn of the assistant to where it speaks next."""
        told = filled(messages)
        ids = self.template.encode_behind(self._opening(told), told, self._cut)
        if not ids or ids[0] != self.end_id:
            raise UserError(
                f"the tokenizer does not encode {self.end}, which ends the assistant's turn, as a "
                "token of its own"
            )
        return ids

    def behind_text(self, messages: Conversation) -> str:
        """The text of `behind`."""
        told = filled(messages)
        turns = [*self._opening(told), *told]
        return self._cut(self.template.rendered(turns, generation=True))

    def parted(
        self, whole: Sequence[int], given: Sequence[Sequence[int]], said: Sequence[str]
    ) -> str | None:
        """Where `whole` is not given, said, given, said, ..., given; None where it is."""
        place = 0
        for number, part in enumerate(given):
            for i, id_ in enumerate(part):
                if whole[place + i : place + i + 1] != [id_]:
                    name = f"what is appended behind turn {number}" if number else "the prompt"
                    return (
                        f"{name} has {self._shown(part[i:])} where the template "
                        f"writes {self._shown(whole[place + i :])}"
                    )
            place += len(part)
            if number == len(said):
                rest = whole[place:]
                return f"the template goes on with {self._shown(rest)}" if rest else None
            end = next((i for i in range(place, len(whole)) if whole[i] == self.end_id), place)
            spoken = self._tokenizer.decode(whole[place:end], skip_special_tokens=False)
            if spoken.strip() != said[number].strip():
                return (
                    f"turn {number + 1} says {said[number][:_SHOWN]!r} and the template "
                    f"writes {spoken[:_SHOWN]!r}"
                )
            place = end
        return None

    def _shown(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(ids[:_SHOWN], skip_special_tokens=False)
        return repr(text[:_SHOWN])

    def formed(self, messages: Conversation) -> list[dict[str, Any]]:
        """Messages of an episode's beginning, their calls as the template takes them."""
        whole = filled(messages)
        for place, message in enumerate(whole):
            calls = message.get("tool_calls") or []
            if message["role"] == "assistant" and calls and self.form is not None:
                given = [
                    (call["function"]["name"], call["function"]["arguments"], call["id"])
                    for call in calls
                ]
                turn = replace(self.form, parallel=True).message(given)
                whole[place] = turn | (
                    {"content": message["content"]} if message["content"] else {}
                )
        return whole

    def written_call(self) -> tuple[str, list[tuple[str, dict[str, Any]]]] | None:
        """What the template writes for calls of tools, and which calls they are."""
        if self.form is None:
            return None
        called = list(PROBES) if self.form.parallel else [PROBES[0]]
        turn = self.form.message([(*call, call_id(i)) for i, call in enumerate(called)])
        return self.said([{"role": "user", "content": ASKED}], turn), called

    def said(self, before: Conversation, turn: Mapping[str, Any]) -> str:
        """What the assistant has said when the template writes `turn`, its end left out."""
        opened = self.template.rendered(before, generation=True)
        text = self.template.rendered([*before, turn], generation=False)
        same = (i for i, (a, b) in enumerate(zip(text, opened, strict=False)) if a != b)
        begin = next(same, min(len(text), len(opened)))
        for token in self._spelled.finditer(text):
            if token.start() < begin < token.end():  # both go on with another one
                begin = token.start()
        end = text.find(self.end, begin)
        return text[begin : end if end >= 0 else len(text)]

    def generation(self) -> str:
        """What the template writes to have the assistant speak."""
        text = self.template.rendered([{"role": "user", "content": ASKED}], generation=True)
        return text[text.rindex(ASKED) + len(ASKED) :]

    def _opening(self, messages: Conversation) -> list[dict[str, Any]]:
        """A conversation behind which `messages` may stand, its last word `SAID`."""
        asked = {"role": "user", "content": ASKED}
        results = [message for message in messages if message["role"] == "tool"]
        if not results or self.form is None:
            return [asked, {"role": "assistant", "content": SAID}]
        calls = [
            (str(one["name"]), {"x": SAID if one is results[-1] else "y"}, str(one["tool_call_id"]))
            for one in results
        ]
        return [asked, self.form.message(calls)]

    def _cut(self, text: str) -> str:
        said = text.find(SAID)
        begin = text.find(self.end, said)
        if said < 0 or begin < 0:
            raise UserError(
                "the chat template leaves out what the assistant said, or does not end its turn, "
                "when there is more behind it: a conversation cannot be appended to under it"
            )
        return text[begin:]

    def _end(self) -> str:
        turns = [
            {"role": "user", "content": ASKED},
            {"role": "assistant", "content": SAID},
            {"role": "user", "content": TOLD},
        ]
        text = self.template.rendered(turns, generation=True)
        if SAID not in text:
            raise UserError(
                "the chat template leaves out what the assistant said: a conversation cannot be "
                "appended to under it"
            )
        rest = text[text.index(SAID) + len(SAID) :]
        found = self._spelled.search(rest)
        if found is None or rest[: found.start()].strip():
            raise UserError(
                f"the chat template writes {rest[:40]!r} behind a turn of the assistant, which "
                "does not begin with a control token of the tokenizer: a policy could not end its "
                "turn. Give data.chat_template a file with one that writes the EOS token there"
            )
        return found[0]

    def _form(self) -> CallForm | None:
        """How the template takes calls; None where it writes none."""
        for form in _FORMS:
            calls = [(name, {"x": SAID}, call_id(i)) for i, (name, _) in enumerate(PROBES)]
            turns = [{"role": "user", "content": ASKED}, form.message(calls)]
            try:
                text = self.template.rendered(turns, generation=False)
            except Exception:  # a template is a program; it says no in its own way
                continue
            if text.count(SAID) == (2 if form.parallel else 1):
                return form
        return None

    def _marks(self) -> list[str]:
        """Control tokens that the template writes and that are not the assistant's to write."""
        texts = [self._opened_by_system()]
        for role in ("user", "tool"):
            try:
                texts.append(self.behind_text([{"role": role, "content": TOLD}]))
            except Exception:  # the proof says which roles a template refuses
                continue
        written = {token for text in texts for token in self._spelled.findall(text)}
        call = self.written_call()
        own = set(self._spelled.findall(call[0])) if call else set[str]()
        own |= {tag for pair in thought_tags(self.template.source) for tag in pair}
        eos = self._tokenizer.eos_token
        return sorted(written - own - {self.end, eos})

    def _opened_by_system(self) -> str:
        user = {"role": "user", "content": ASKED}
        try:
            return self.template.rendered(
                [{"role": "system", "content": TOLD}, user], generation=True
            )
        except Exception:  # a template without that role says so in its own way
            return self.template.rendered([user], generation=True)


def _control_tokens(tokenizer: Any) -> dict[str, int]:
    """Special and added tokens by their spelling, less white space."""
    known: Mapping[str, int] = {
        **tokenizer.get_added_vocab(),
        **{token: tokenizer.convert_tokens_to_ids(token) for token in tokenizer.all_special_tokens},
    }
    return {token: id_ for token, id_ in known.items() if len(token.strip()) > 1}
