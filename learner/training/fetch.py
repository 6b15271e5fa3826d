"""A step's record batches, from the object store to the learner, on demand or ahead of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa

_TIMEOUT_S = 300.0


def fetch(batches: Sequence[Any]) -> list[pa.RecordBatch]:
    """The record batches, with references resolved. Those that are here are left as they are."""
    if all(isinstance(batch, pa.RecordBatch) for batch in batches):
        return list(batches)
    import ray

    fetched: list[pa.RecordBatch] = ray.get(list(batches), timeout=_TIMEOUT_S)
    return fetched


def fetch_ahead(batches: Sequence[Any]) -> None:
    """Have Ray bring these references' batches to this node, and return at once.

    A reference that is lost is no error here: `fetch` will say so, if the batch is ever trained on.
    """
    import ray

    ray.wait(list(batches), num_returns=len(batches), timeout=0, fetch_local=True)
