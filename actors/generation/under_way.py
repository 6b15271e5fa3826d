"""Groups that a generator has begun, whose batches are fetched by a call each.

    begin    a group's batches, as its completions end  ->  a number
    next_of  that number  ->  the next batch, and what is behind it

A call gives two values: the batch, which stays where it was made, and beside it one small number
that the coordinator waits for:

    > 0     more is to come of the group, under this number
    WHOLE   that was all
    NONE    that was all before: nothing has ended in time since, and there is no batch

So a group that ends at once is a single call. A stream of Ray costs three times as much of the
caller's processor, and a reference inside a streamed item is not counted (ray#58080).
"""

from __future__ import annotations

from collections.abc import AsyncGenerator

import pyarrow as pa

WHOLE, NONE = 0, -1

Batches = AsyncGenerator[tuple[pa.RecordBatch, bool], None]
"""Batches of a group; beside each whether there may be another."""


class UnderWay:
    """The groups of one generator that are begun and not all handed out."""

    def __init__(self) -> None:
        self._groups: dict[int, Batches] = {}
        self._begun = 0

    def begin(self, batches: Batches) -> int:
        """The number of a new group, of which `next_of` gives the batches."""
        self._begun += 1
        self._groups[self._begun] = batches
        return self._begun

    async def next_of(self, number: int) -> tuple[pa.RecordBatch | None, int]:
        """The next batch of a group, and the number that says what is behind it.

        Raises:
            Exception: that of a completion. Nothing more comes of its group.
        """
        batches = self._groups.pop(number)
        try:
            batch, more = await anext(batches)
        except StopAsyncIteration:
            return None, NONE
        if more:
            self._groups[number] = batches
            return batch, number
        await batches.aclose()
        return batch, WHOLE

    def __len__(self) -> int:
        return len(self._groups)
