"""All batches that a generator makes of a group, and an engine that needs no model."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Any

import pyarrow as pa
from judged_groups import said

from actors.generation.engine import Completion
from actors.generation.generator import Generator
from actors.generation.under_way import NONE, WHOLE


class Engine:
    """Says the number of its prompt's tokens, twice."""

    def __init__(self) -> None:
        self.asked: list[tuple[list[int], dict[str, Any]]] = []

    async def generate(
        self, request_id: str, prompt_ids: list[int], sampling: dict[str, Any]
    ) -> Completion:
        self.asked.append((prompt_ids, sampling))
        return said([len(prompt_ids)] * 2)


class Tokenizer:
    """Writes tokens as their numbers."""

    def decode(self, token_ids: list[int], **_: bool) -> str:
        return " ".join(map(str, token_ids))


async def batches_behind(
    generator: Generator, first: Awaitable[tuple[pa.RecordBatch | None, int]]
) -> list[pa.RecordBatch]:
    """Those of a group that is under way, one call after the other.

    Args:
        first: the call that begins it.
    """
    batch, number = await first
    found = [] if number == NONE else [batch]
    while number > WHOLE:
        batch, number = await generator.more_of(number)
        found += [] if number == NONE else [batch]
    return found
