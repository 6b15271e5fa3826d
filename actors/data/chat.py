"""From the turns of a question to the text and tokens a generator is given.

A template is a program of the model's, and so are the tokens around a text. `Template` tries what
both do before a run begins: that a system message arrives, that the assistant is asked to speak,
that a prompt begins with one BOS and does not end with EOS. What a user says is text: a control
token that is spelled in it is encoded letter by letter.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from actors.data.controls import Controls, control_tokens
from common.config.sections import DataConfig
from common.errors import UserError, nearest

_SLOT = "{prompt}"
_MARK = "grpolambdaword"
"""Letters that no template and no tokenizer treats in a way of its own."""

_BETWEEN_TURNS = "\n\n"
"""Between the turns of a row under `template: plain`."""

Conversation = Sequence[Mapping[str, Any]]
"""Messages: `role` and `content`; of an assistant `tool_calls` too, of a tool `tool_call_id`."""


class Tokenizer(Protocol):
    """What is used of a Hugging Face tokenizer."""

    chat_template: Any
    all_special_tokens: list[str]
    bos_token_id: int | None
    eos_token_id: int | None

    def __call__(self, text: list[str], add_special_tokens: bool, **kwargs: Any) -> Any: ...

    def apply_chat_template(
        self,
        conversation: Any,
        tokenize: bool,
        add_generation_prompt: bool,
        **kwargs: Any,
    ) -> Any: ...


class Template:
    """`data.template` applied: `render` for people, `encode` for the model.

    Args:
        tools: JSON schemas of the tools that the policy may call, for the template to describe.

    Raises: `UserError` at construction when the template and the tokenizer do not go together.
    """

    def __init__(
        self, config: DataConfig, tokenizer: Tokenizer, tools: Sequence[Mapping[str, Any]] = ()
    ) -> None:
        self._chat = config.template == "chat"
        self._plain_template = config.plain_template
        self._tokenizer = tokenizer
        self._system = config.system_prompt
        self._options: dict[str, Any] = dict(config.chat_template_kwargs)
        if config.chat_template is not None:
            self._options["chat_template"] = _read_template(config.chat_template)
        self.controls = Controls(control_tokens(tokenizer))
        if tools:
            self._options["tools"] = [dict(tool) for tool in tools]
        self.guard(())
        if self._chat:
            self._check_chat(config)
        else:
            self._check_plain(config)
        self._check_ends()

    def render(self, asked: str | Conversation) -> str:
        """The text of the whole prompt, special tokens of a chat template spelled out.

        Args:
            asked: a question, or all turns; their own system message comes before the run's.
        """
        turns = [{"role": "user", "content": asked}] if isinstance(asked, str) else list(asked)
        if not self._chat:
            # Not str.format: a plain template may hold other braces, and so may the question.
            last = self._plain_template.replace(_SLOT, turns[-1]["content"])
            return _BETWEEN_TURNS.join([*(turn["content"] for turn in turns[:-1]), last])
        return self.rendered(turns, generation=True)

    @property
    def source(self) -> str:
        """The chat template as a program."""
        return str(self._options.get("chat_template", self._tokenizer.chat_template) or "")

    def guard(self, tokens: Iterable[str]) -> None:
        """Let what is said become none of these tokens either.

        Raises: `UserError` where the description of a tool spells a control token.
        """
        self.controls = Controls([*self.controls.tokens, *tokens])
        _, words = self.controls.hide(self._options.get("tools", []))
        if words:
            raise UserError(
                f"the description of a tool spells {', '.join(sorted(set(words.values())))}, which "
                "is a control token of the model: say it in other words"
            )

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of rendered prompts. A chat template writes its own special tokens; a plain
        text gets those the tokenizer puts around any text."""
        ids: list[list[int]] = self._tokenizer(list(texts), add_special_tokens=not self._chat)[
            "input_ids"
        ]
        return ids

    def encode_asked(self, asked: Sequence[str | Conversation]) -> list[list[int]]:
        """Token ids of questions or turns, rendered; what they say becomes no control token."""
        hidden = [self.controls.hide(turns) for turns in asked]
        texts = [self.render(turns) for turns, _ in hidden]
        safe = [text for text, (_, words) in zip(texts, hidden, strict=True) if not words]
        ids = iter(self.encode(safe) if safe else [])
        return [
            self.controls.encode(self._tokenizer, text, words, not self._chat)
            if words
            else next(ids)
            for text, (_, words) in zip(texts, hidden, strict=True)
        ]

    def encode_around(self, asked: Conversation, hole: str) -> list[list[int]]:
        """Token ids of turns, rendered, on both sides of every place where they say `hole`."""
        turns, words = self.controls.hide(list(asked))
        return [
            self.controls.encode(self._tokenizer, part, words, not self._chat and number == 0)
            for number, part in enumerate(self.render(turns).split(hole))
        ]

    def encode_solution(self, text: str) -> list[int]:
        """Token ids of a reference solution, as they would stand inside a completion."""
        ids: list[list[int]] = self._tokenizer([text], add_special_tokens=False)["input_ids"]
        return ids[0]

    def encode_behind(
        self, opening: Conversation, messages: Conversation, cut: Callable[[str], str]
    ) -> list[int]:
        """Token ids of what the chat template writes for `messages` behind `opening`, and of its
        call to speak.

        Args:
            cut: takes that part out of the rendered text.
        """
        turns, words = self.controls.hide(list(messages))
        text = cut(self.rendered([*opening, *turns], generation=True))
        return self.controls.encode(self._tokenizer, text, words, add_special_tokens=False)

    def rendered(self, turns: Conversation, generation: bool) -> str:
        """What the chat template makes of messages.

        Args:
            generation: ask the assistant to speak behind them.
        """
        if self._system is not None and not any(turn["role"] == "system" for turn in turns):
            turns = [{"role": "system", "content": self._system}, *turns]
        text: str = self._tokenizer.apply_chat_template(
            list(turns), tokenize=False, add_generation_prompt=generation, **self._options
        )
        return text

    def check_turns(self, turns: Conversation, place: str) -> None:
        """Raise `UserError` when the rendering leaves out what a turn says."""
        try:
            text = self.render(turns)
        except UserError:
            raise
        except Exception as error:  # a template is a program of the model's
            raise UserError(
                f"{place}: the tokenizer's chat template refused its turns "
                f"({', '.join(turn['role'] for turn in turns)}): {error}"
            ) from error
        for turn in turns:
            if turn["content"].strip() not in text:
                raise UserError(
                    f"{place}: the tokenizer's chat template leaves out what the {turn['role']} "
                    "says: give data.chat_template a file with one that keeps it, or use "
                    "data.template=plain"
                )

    def _check_chat(self, config: DataConfig) -> None:
        if not self.source:
            raise UserError(
                "the tokenizer has no chat template, which data.template=chat needs: "
                "set data.template=plain, give data.chat_template a file, or use an "
                "instruction-tuned model"
            )
        names = sorted(set(re.findall(r"[A-Za-z_]\w+", self.source)))
        for name in config.chat_template_kwargs:
            if name not in names:
                raise UserError(
                    f"data.chat_template_kwargs names {name}, which the chat template does not "
                    f"look at{nearest(name, names)}"
                )
        turns = [{"role": "user", "content": _MARK}]
        try:
            text = self.rendered(turns, generation=True)
            without = self.rendered(turns, generation=False)
        except Exception as error:  # a template is a program of the model's; it may raise anything
            remedy = "drop data.system_prompt or " if self._system else ""
            raise UserError(
                f"the tokenizer's chat template refused a "
                f"{'system and a ' if self._system else ''}user message: {error}; "
                f"{remedy}set data.template=plain"
            ) from error
        if self._system is not None and self._system.strip() not in text:
            raise UserError(
                "the tokenizer's chat template leaves the system message out: drop "
                "data.system_prompt, or give data.chat_template a file that writes it"
            )
        if text == without and not self._speaks_next(text, turns):
            raise UserError(
                "the tokenizer's chat template does not ask the assistant to speak "
                "(add_generation_prompt changes nothing): give data.chat_template a file that "
                "does, or set data.template=plain"
            )

    def _speaks_next(self, text: str, turns: Conversation) -> bool:
        """Whether an answer follows on `text` as it is, as with `[INST] question [/INST]`."""
        said = {"role": "assistant", "content": _MARK}
        try:
            answered = self.rendered([*turns, said], generation=False)
        except Exception:  # a template that takes no answer does not ask for one
            return False
        return answered.startswith(text) and answered[len(text) :].lstrip().startswith(_MARK)

    def _check_plain(self, config: DataConfig) -> None:
        if _SLOT not in self._plain_template:
            raise UserError(
                f"data.plain_template={self._plain_template!r} has no {_SLOT}, "
                "the place where the question goes"
            )
        for key, given in (
            ("system_prompt", config.system_prompt),
            ("chat_template", config.chat_template),
            ("chat_template_kwargs", config.chat_template_kwargs),
        ):
            if given:
                raise UserError(
                    f"data.{key} is for data.template=chat: "
                    "with data.template=plain write it into data.plain_template"
                )

    def _check_ends(self) -> None:
        """One BOS at the beginning, no EOS at the end."""
        bos, eos = self._tokenizer.bos_token_id, self._tokenizer.eos_token_id
        (ids,) = self.encode_asked([_MARK])
        if bos is not None and ids[:2] == [bos, bos]:
            raise UserError(
                "a prompt would begin with two BOS tokens, one of the template and one of the "
                "tokenizer: leave it out of data.plain_template"
            )
        if eos is not None and ids and ids[-1] == eos:
            raise UserError(
                "a prompt would end with the EOS token, behind which a model has nothing to say: "
                "give data.chat_template a file that asks the assistant to speak, or take a "
                "tokenizer that does not append EOS to every text"
            )


def _read_template(name: str) -> str:
    try:
        return Path(name).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"data.chat_template={name} cannot be read: {error}") from error
