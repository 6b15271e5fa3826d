"""From the turns of a question to the text and tokens a generator is given.

A template is a program of the model's, and so are the tokens around a text. `Template` tries what
both do before a run begins: that a system message arrives, that the assistant is asked to speak,
that a prompt begins with one BOS and does not end with EOS. What a user says is text: a control
token that is spelled in it is encoded letter by letter.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from common.config.sections import DataConfig
from common.errors import UserError, nearest

_SLOT = "{prompt}"
_MARK = "grpolambdamark"
"""Letters that no template and no tokenizer treats in a way of its own."""

Conversation = Sequence[dict[str, str]]


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

    Raises: `UserError` at construction when the template and the tokenizer do not go together.
    """

    def __init__(self, config: DataConfig, tokenizer: Tokenizer) -> None:
        self._chat = config.template == "chat"
        self._plain_template = config.plain_template
        self._tokenizer = tokenizer
        self._system = config.system_prompt
        self._options: dict[str, Any] = dict(config.chat_template_kwargs)
        if config.chat_template is not None:
            self._options["chat_template"] = _read_template(config.chat_template)
        self._controls = sorted(filter(None, tokenizer.all_special_tokens), key=len, reverse=True)
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
            if len(turns) != 1 or turns[0]["role"] != "user":
                raise UserError(
                    f"data.template=plain takes one question, and there are {len(turns)} turns of "
                    f"{', '.join(turn['role'] for turn in turns)}: set data.template=chat"
                )
            # Not str.format: a plain template may hold other braces, and so may the question.
            return self._plain_template.replace(_SLOT, turns[0]["content"])
        return self._rendered(turns, generation=True)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of rendered prompts. A chat template writes its own special tokens; a plain
        text gets those the tokenizer puts around any text."""
        ids: list[list[int]] = self._tokenizer(list(texts), add_special_tokens=not self._chat)[
            "input_ids"
        ]
        return ids

    def encode_asked(self, asked: Sequence[str | Conversation]) -> list[list[int]]:
        """Token ids of questions or turns, rendered; what they say becomes no control token."""
        safe = [turn for turn in asked if not self._spells_control(turn)]
        ids = iter(self.encode([self.render(turns) for turns in safe]) if safe else [])
        return [
            self._encode_apart(turns) if self._spells_control(turns) else next(ids)
            for turns in asked
        ]

    def encode_solution(self, text: str) -> list[int]:
        """Token ids of a reference solution, as they would stand inside a completion."""
        ids: list[list[int]] = self._tokenizer([text], add_special_tokens=False)["input_ids"]
        return ids[0]

    def _spells_control(self, asked: str | Conversation) -> bool:
        texts = [asked] if isinstance(asked, str) else [turn["content"] for turn in asked]
        return any(token in text for text in texts for token in self._controls)

    def _encode_apart(self, asked: str | Conversation) -> list[int]:
        """Template and contents encoded one by one, the contents without control tokens."""
        turns = [{"role": "user", "content": asked}] if isinstance(asked, str) else list(asked)
        marks = [f"{_MARK}{number}x" for number in range(len(turns))]
        marked = [turn | {"content": mark} for turn, mark in zip(turns, marks, strict=True)]
        contents = dict(zip(marks, (turn["content"] for turn in turns), strict=True))
        ids: list[int] = []
        parts = re.split(f"({'|'.join(marks)})", self.render(marked))
        for number, part in enumerate(parts):
            own = contents.get(part)
            encoded = self._tokenizer(
                [part if own is None else own],
                add_special_tokens=not self._chat and number == 0,
                split_special_tokens=own is not None,
            )["input_ids"][0]
            ids += encoded
        return ids

    def _rendered(self, turns: Conversation, generation: bool) -> str:
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
        known = self._options.get("chat_template", self._tokenizer.chat_template)
        if not known:
            raise UserError(
                "the tokenizer has no chat template, which data.template=chat needs: "
                "set data.template=plain, give data.chat_template a file, or use an "
                "instruction-tuned model"
            )
        names = sorted(set(re.findall(r"[A-Za-z_]\w+", str(known))))
        for name in config.chat_template_kwargs:
            if name not in names:
                raise UserError(
                    f"data.chat_template_kwargs names {name}, which the chat template does not "
                    f"look at{nearest(name, names)}"
                )
        turns = [{"role": "user", "content": _MARK}]
        try:
            text = self._rendered(turns, generation=True)
            without = self._rendered(turns, generation=False)
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
        if text == without:
            raise UserError(
                "the tokenizer's chat template does not ask the assistant to speak "
                "(add_generation_prompt changes nothing): give data.chat_template a file that "
                "does, or set data.template=plain"
            )

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
