"""Small sources of made-up prompts."""

from __future__ import annotations

from typing import Any

from actors.data.chat import Template
from actors.data.prompts import PromptSource
from actors.data.schemas import Row
from actors.data.sources import Rows
from common.config.sections import DataConfig, PromptOrder


class LetterTokenizer:
    """As much of a tokenizer as the cursor needs."""

    chat_template = None
    all_special_tokens: list[str] = []  # noqa: RUF012
    bos_token_id = eos_token_id = None

    def __call__(self, text: list[str], add_special_tokens: bool, **kwargs: Any) -> Any:
        return {"input_ids": [[ord(letter) for letter in one] for one in text]}

    def apply_chat_template(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError


def small_source(size: int, seed: int = 0, order: PromptOrder = "shuffle") -> PromptSource:
    """`size` training prompts whose texts are q0, q1, ..."""
    rows = [Row(f"q{i}", "{}", None, None, f"row {i}") for i in range(size)]
    template = Template(DataConfig(template="plain"), LetterTokenizer())
    return PromptSource(Rows(rows, [], 0), template, seed, order)
