"""All batches that a generator makes of a group."""

from __future__ import annotations

from collections.abc import Awaitable

import pyarrow as pa

from actors.generation.generator import Generator
from actors.generation.under_way import NONE, WHOLE


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
