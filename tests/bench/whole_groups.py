"""References to all batches of groups that a generator has been asked for."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa

from actors.generation.generator import Generator
from actors.generation.under_way import NONE, WHOLE
from common.supervision.calls import Handle, Ref, ask_pair, get_all

Begun = tuple[Ref[pa.RecordBatch | None], Ref[int]]
"""What `Generator.generate_group` gives: a batch, and the number of what is behind it."""


def batches_behind(
    generator: Handle[Generator], begun: Sequence[Begun], timeout_s: float
) -> list[Ref[pa.RecordBatch | None]]:
    """References to the batches of groups, once all of them are there."""
    found = []
    while begun:
        numbers = get_all([number for _, number in begun], timeout_s)
        found += [
            batch for (batch, _), number in zip(begun, numbers, strict=True) if number != NONE
        ]
        begun = [
            ask_pair(generator, Generator.more_of, number) for number in numbers if number > WHOLE
        ]
    return found
