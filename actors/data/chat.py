"""From a question to the text and tokens a generator is given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from common.config.sections import DataConfig
from common.errors import UserError

_SLOT = "{prompt}"


class Tokenizer(Protocol):
    """What is used of a Hugging Face tokenizer."""

    chat_template: Any

    def __call__(self, text: list[str], add_special_tokens: bool) -> Any: ...

    def apply_chat_template(
        self, conversation: list[dict[str, str]], tokenize: bool, add_generation_prompt: bool
    ) -> Any: ...


class Template:
    """`data.template` applied: `render` for people, `encode` for the model.

    Raises: `UserError` at construction when the template and the tokenizer do not go together.
    """

    def __init__(self, config: DataConfig, tokenizer: Tokenizer) -> None:
        self._chat = config.template == "chat"
        self._plain_template = config.plain_template
        self._tokenizer = tokenizer
        self._system: list[dict[str, str]] = []
        if config.system_prompt is not None:
            self._system = [{"role": "system", "content": config.system_prompt}]
        if self._chat:
            self._check_chat()
        else:
            self._check_plain()

    def render(self, question: str) -> str:
        """The text of the whole prompt, special tokens of a chat template spelled out."""
        if not self._chat:
            # Not str.format: a plain template may hold other braces, and so may the question.
            return self._plain_template.replace(_SLOT, question)
        conversation = [*self._system, {"role": "user", "content": question}]
        text: str = self._tokenizer.apply_chat_template(
            conversation, tokenize=False, add_generation_prompt=True
        )
        return text

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of rendered prompts. A chat template writes its own special tokens; a plain
        text gets those the tokenizer puts around any text."""
        ids: list[list[int]] = self._tokenizer(list(texts), add_special_tokens=not self._chat)[
            "input_ids"
        ]
        return ids

    def encode_solution(self, text: str) -> list[int]:
        """Token ids of a reference solution, as they would stand inside a completion."""
        ids: list[list[int]] = self._tokenizer([text], add_special_tokens=False)["input_ids"]
        return ids[0]

    def _check_chat(self) -> None:
        if not self._tokenizer.chat_template:
            raise UserError(
                "the tokenizer has no chat template, which data.template=chat needs: "
                "set data.template=plain, or use an instruction-tuned model"
            )
        try:
            self.render("question")
        except Exception as error:  # a template is a program of the model's; it may raise anything
            remedy = "drop data.system_prompt or " if self._system else ""
            raise UserError(
                f"the tokenizer's chat template refused a "
                f"{'system and a ' if self._system else ''}user message: {error}; "
                f"{remedy}set data.template=plain"
            ) from error

    def _check_plain(self) -> None:
        if _SLOT not in self._plain_template:
            raise UserError(
                f"data.plain_template={self._plain_template!r} has no {_SLOT}, "
                "the place where the question goes"
            )
        if self._system:
            raise UserError(
                "data.system_prompt is for data.template=chat: "
                "with data.template=plain write it into data.plain_template"
            )
