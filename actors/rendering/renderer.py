"""Between messages and tokens: what an episode is made of, and what a policy said in it.

An episode is appended to and never rendered again. `Renderer.prompt` renders its beginning, once.
Behind every turn that was sampled, `Renderer.behind` gives the tokens that bring the next messages
and ask the policy to speak. So the tokens that are trained on are those that were sampled: decoding
and encoding them again would change some. `Renderer.start` proves for the model at hand that what
is appended is what its chat template would write.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from actors.data.chat import Conversation, Template
from actors.environments.base import ToolCall
from actors.rendering.frame import Frame
from actors.rendering.proof import Difference, difference
from actors.rendering.tool_calls import CallReader, choose_reader
from actors.verifiers.thoughts import thought_and_answer
from common.config.sections import DataConfig, EnvironmentConfig
from common.errors import UserError, first_line

Role = Literal["user", "tool"]
_ROLES: tuple[Role, ...] = ("user", "tool")


@dataclass(frozen=True)
class Reply:
    """What a policy said in a turn."""

    text: str
    """The words of the turn, without thoughts, calls and control tokens."""
    thought: str
    calls: tuple[ToolCall, ...]
    malformed: str
    """Why the turn or a call in it cannot be read; empty where it can."""


class Renderer:
    """Renders the episodes of one model. Start it with `Renderer.start`.

    `stop_token_ids` end a turn when they are sampled: EOS, the template's end of a turn, and every
    token that marks a role. `notes` are to be said before a run begins.
    """

    def __init__(
        self,
        frame: Frame,
        tokenizer: Any,
        reader: CallReader | None,
        refused: Mapping[str, str],
        notes: Sequence[str],
    ) -> None:
        self._frame = frame
        self._tokenizer = tokenizer
        self._reader = reader
        self._refused = dict(refused)
        self._generation = frame.generation()
        silent = {*filter(None, tokenizer.all_special_tokens), *frame.marks.values()}
        self._silent = sorted(silent, key=len, reverse=True)
        self.stop_token_ids = (*frame.ends, *sorted(frame.marks))
        self.notes = tuple(notes)

    @classmethod
    def start(
        cls,
        tokenizer: Any,
        config: DataConfig,
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        tool_parser: str = "auto",
        thoughts: Literal["refuse", "keep"] = "refuse",
        roles: Sequence[Role] = (),
    ) -> Renderer:
        """Find out what the chat template does, and prove that appending gives the same.

        Args:
            tools: JSON schemas of the tools that the policy may call
                (`transformers.utils.get_json_schema`).
            tool_parser: name of the vLLM parser that reads calls; `auto` finds it.
            thoughts: `keep` accepts that an episode holds the thoughts of earlier turns where the
                template would leave them out.
            roles: who must be able to speak behind the policy; empty: `tool` where there are
                tools, else `user`. Whether others can is found out too.

        Raises: `UserError` where the template cannot be appended to, with the difference.
        """
        if config.template != "chat":
            raise UserError(
                "an episode of several turns needs a chat template: set data.template=chat, and "
                "data.chat_template where the tokenizer has none"
            )
        template = Template(config, tokenizer, tools)
        frame = Frame(template, tokenizer, bool(tools))
        notes = _remarks(template, frame)
        reader = None
        if tools:
            _check_shown(template, tools, tool_parser)
            reader, choice = choose_reader(frame, tokenizer, tools, tool_parser)
            notes.append(choice)
        refused: dict[str, str] = {}
        kept: dict[str, str] = {}
        for role in _ROLES:
            found = difference(frame, role)
            if found is None:
                continue
            if found.thoughts_alone and thoughts == "keep":
                kept[role] = found.message
            else:
                refused[role] = _refusal(role, found)
        for role in roles or (["tool"] if tools else ["user"]):
            if role in refused:
                raise UserError(refused[role])
        if kept:
            notes.append(
                "an episode keeps the thoughts of earlier turns, which the chat template would "
                f"leave out before a message of the {' or the '.join(kept)}: "
                f"{next(iter(kept.values()))}"
            )
        return cls(frame, tokenizer, reader, refused, notes)

    @classmethod
    def of_environment(
        cls,
        tokenizer: Any,
        config: DataConfig,
        environment: EnvironmentConfig,
        tools: Sequence[Mapping[str, Any]],
    ) -> Renderer:
        """The renderer of the episodes that are played in an environment with `tools`.

        Raises: as `start`.
        """
        return cls.start(
            tokenizer,
            config,
            tools=tools,
            tool_parser=environment.tool_parser,
            thoughts=environment.thoughts,
            roles=[environment.role],
        )

    def prompt(self, messages: Conversation) -> list[int]:
        """Token ids of the beginning of an episode, up to where the policy speaks."""
        try:
            return self._frame.template.encode_asked([self._frame.formed(messages)])[0]
        except UserError:
            raise
        except Exception as error:  # a template is a program of the model's; it may raise anything
            raise UserError(
                f"the chat template refused messages of {_named(messages)}: {first_line(error)}"
            ) from error

    def behind(self, messages: Conversation, *, ended: bool) -> list[int]:
        """Token ids to give behind a turn: the messages, and the call to speak again.

        Args:
            messages: of the roles `user` and `tool`.
            ended: whether the turn ends itself (`ended`). A turn that was cut, or that another
                token has stopped, is given its end.
        """
        for message in messages:
            if message["role"] not in _ROLES:
                raise ValueError(f"a {message['role']} does not speak behind the policy")
            if message["role"] in self._refused:
                raise UserError(self._refused[message["role"]])
        try:
            ids = self._frame.behind(messages)
        except UserError:
            raise
        except Exception as error:  # a template is a program of the model's; it may raise anything
            raise UserError(
                f"the chat template refused messages of {_named(messages)} behind a turn of the "
                f"policy: {first_line(error)}"
            ) from error
        return ids[1:] if ended else ids

    def ended(self, token_ids: Sequence[int]) -> bool:
        """Whether a turn ends as the template ends it, so that `behind` need not end it."""
        return bool(token_ids) and token_ids[-1] == self._frame.end_id

    def parse(self, token_ids: Sequence[int]) -> Reply:
        """What a policy said in a turn that it sampled."""
        ids = list(token_ids)
        if ids and ids[-1] in self._frame.ends:
            ids.pop()
        marks = sorted({self._frame.marks[id_] for id_ in ids if id_ in self._frame.marks})
        text: str = self._tokenizer.decode(ids, skip_special_tokens=False)
        thought, answer = thought_and_answer(text, self._generation)
        if marks:
            return Reply(
                self._words(answer),
                self._words(thought),
                (),
                f"the turn holds {', '.join(marks)}, with which others begin to speak",
            )
        if self._reader is None:
            return Reply(self._words(answer), self._words(thought), (), "")
        read = self._reader.read(answer)
        return Reply(self._words(read.text), self._words(thought), read.calls, read.malformed)

    def _words(self, text: str) -> str:
        for token in self._silent:
            text = text.replace(token, "")
        return text


def _remarks(template: Template, frame: Frame) -> list[str]:
    """What a template does that a run should know of."""
    notes = []
    if "strftime_now" in template.source:
        notes.append(
            "the chat template writes today's date into a prompt, so the same question has other "
            "tokens tomorrow: a resumed run is not bitwise the same"
        )
    if not frame.marks:
        notes.append(
            "the chat template marks roles with plain words, which any text can imitate: a turn "
            "in which the policy forges a message of somebody else is not noticed"
        )
    return notes


def _check_shown(template: Template, tools: Sequence[Mapping[str, Any]], tool_parser: str) -> None:
    """A policy must be told which tools there are, by the template or by the system prompt."""
    text = template.rendered([{"role": "user", "content": "?"}], generation=True)
    names = [str(tool["function"]["name"]) for tool in tools]
    missing = [name for name in names if name not in text]
    if missing and tool_parser == "auto":
        raise UserError(
            f"the chat template does not tell the policy of the tools {', '.join(missing)}: "
            "describe them in data.system_prompt, or give data.chat_template a file with one that "
            "does"
        )


def _refusal(role: str, found: Difference) -> str:
    remedy = (
        "it leaves out what was thought in earlier turns; set environment.thoughts=keep to train "
        "on episodes that keep it"
        if found.thoughts_alone
        else "give data.chat_template a file with one that only appends"
    )
    return (
        f"an episode cannot be appended to under this chat template when a message of the {role} "
        f"follows: {found.message}; {remedy}"
    )


def _named(messages: Conversation) -> str:
    return ", ".join(str(message["role"]) for message in messages) or "nobody"
