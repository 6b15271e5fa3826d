"""Calls of tools are read by vLLM's parsers, which need no engine.

Which parser? The one that reads what the chat template writes. `auto` tries those of vLLM, and a
parser that is named is held to the same: it must give back the calls that the template was asked
to write, and find none in plain words.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from actors.environments.base import ToolCall
from actors.rendering.frame import PROBES, Frame
from actors.verifiers.thoughts import answer_part
from common.errors import UserError, first_line, nearest

_FIRST = ("hermes", "qwen3_coder", "llama3_json", "mistral", "pythonic", "glm45")
"""Tried before the others, since most models that are trained here use one of them."""
_PLAIN = "The result is {19}, as [a](b) says; so 2 < 3."
_TAG = re.compile(r'<[^<>\s]+>|\[[A-Z_]+\]|"\w+"')
"""What a call begins with: a tag, or the first key of its JSON."""
_KINDS = {str: "string", int: "integer"}


@dataclass(frozen=True)
class Read:
    """What was read of an answer: words, calls, and why a call could not be read."""

    text: str
    calls: tuple[ToolCall, ...]
    malformed: str


class CallReader:
    """Reads calls of tools with one of vLLM's parsers."""

    def __init__(
        self, name: str, tokenizer: Any, tools: Sequence[Mapping[str, Any]], tag: str = ""
    ) -> None:
        """Take the parser called `name`.

        Args:
            tag: what the template writes where a call begins; an answer that holds it and has no
                call is malformed. Empty: the parser's own, where it has one.
        """
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
        from vllm.tool_parsers import ToolParserManager

        self.name = name
        self._tokenizer = tokenizer
        self._parser = ToolParserManager.get_tool_parser(name)
        self._request = ChatCompletionRequest(model="", messages=[], tools=[dict(t) for t in tools])
        # Some want tokens that a tokenizer lacks.
        parser = self._parser(tokenizer, self._request.tools)
        own = getattr(parser, "tool_call_start_token", None)
        self._tag = tag or (own if isinstance(own, str) else "")

    def read(self, answer: str) -> Read:
        """Words and calls of an answer, thoughts left out.

        A parser is given what a policy wrote, and whatever it raises says that this is no call.
        """
        # A parser of its own for each answer: some of them remember the last one.
        parser = self._parser(self._tokenizer, self._request.tools)
        with _complaints(self._parser) as complaints:
            try:
                found = parser.extract_tool_calls(answer, self._request)
            except Exception as error:  # see above
                complaints.append(error)
        if complaints and self._begins(answer):
            return Read(answer, (), f"a call of a tool cannot be read: {_reason(complaints[-1])}")
        if complaints:
            return Read(answer, (), "")
        calls = []
        for call in found.tool_calls if found.tools_called else []:
            arguments = _arguments(call.function.arguments)
            if arguments is None:
                return Read(
                    answer, (), f"the arguments of {call.function.name} are no object of JSON"
                )
            calls.append(ToolCall(call.function.name, arguments))
        if not calls and self._begins(answer):
            return Read(answer, (), f"a call of a tool cannot be read: {self._tag} begins none")
        return Read((found.content or "") if calls else answer, tuple(calls), "")

    def _begins(self, answer: str) -> bool:
        return bool(self._tag) and self._tag in answer


def choose_reader(
    frame: Frame, tokenizer: Any, tools: Sequence[Mapping[str, Any]], name: str
) -> tuple[CallReader, str]:
    """A reader for `tools`, and what is to be said about the choice.

    Args:
        name: of one of vLLM's parsers, or `auto`.

    Raises: `UserError` where no parser fits, or the one that is named does not.
    """
    from vllm.tool_parsers import ToolParserManager

    known = sorted(ToolParserManager.list_registered())
    if name != "auto" and name not in known:
        raise UserError(
            f"environment.tool_parser={name} is none of vLLM's{nearest(name, known)}: auto, "
            f"{', '.join(known)}"
        )
    written = frame.written_call()
    if written is None:
        if name == "auto":
            raise UserError(
                "the chat template writes no calls of tools, so it does not say how the policy is "
                "to write them: describe that in data.system_prompt and name the parser that "
                "reads it (environment.tool_parser=hermes), or give data.chat_template a file "
                "with one for tools"
            )
        return CallReader(name, tokenizer, tools), (
            f"calls of tools are read by vLLM's parser {name}; the chat template writes none, so "
            "data.system_prompt has to say what they look like"
        )
    text, called = written
    said = answer_part(text, frame.generation())
    before = _TAG.search(said[: said.find(called[0][0])])
    tag = before[0] if before else ""
    names = [name] if name != "auto" else [*_FIRST, *(one for one in known if one not in _FIRST)]
    for one in names:
        if _reads(one, tokenizer, said, called):
            reader = CallReader(one, tokenizer, tools, tag)
            return reader, f"calls of tools are read by vLLM's parser {one}"
    which = "no parser of vLLM's reads" if name == "auto" else f"vLLM's parser {name} does not read"
    raise UserError(
        f"the chat template writes a call of a tool as {said.strip()!r}, and {which} that back: "
        "set environment.tool_parser to another, or give data.chat_template a file with another"
    )


def _reads(name: str, tokenizer: Any, said: str, called: list[tuple[str, dict[str, Any]]]) -> bool:
    try:
        reader = CallReader(name, tokenizer, [_schema(*probe) for probe in PROBES])
        plain = reader.read(_PLAIN)
        calls = reader.read(said).calls
    except Exception:  # a parser refuses a tokenizer in its own way
        return False
    return plain == Read(_PLAIN, (), "") and [(c.name, c.arguments) for c in calls] == called


def _schema(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    properties = {key: {"type": _KINDS[type(value)]} for key, value in arguments.items()}
    return {
        "type": "function",
        "function": {
            "name": name,
            "description": "",
            "parameters": {"type": "object", "properties": properties},
        },
    }


def _arguments(text: str) -> dict[str, Any] | None:
    try:
        read = json.loads(text)
    except ValueError:
        return None
    return read if isinstance(read, dict) else None


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {first_line(error)}"


@contextmanager
def _complaints(parser: type) -> Iterator[list[BaseException]]:
    """What a parser logs as an error while it reads; it is kept from the log."""
    caught: list[BaseException] = []

    def keep(record: logging.LogRecord) -> bool:
        if record.exc_info and record.exc_info[1] is not None:
            caught.append(record.exc_info[1])
            return False
        return True

    loggers = {logging.getLogger(one.__module__) for one in parser.__mro__}
    for logger in loggers:
        logger.addFilter(keep)
    try:
        yield caught
    finally:
        for logger in loggers:
            logger.removeFilter(keep)
