"""A step's record batches, from the object store to the learner, on demand or ahead of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from common.errors import RunError
from common.record.parts import learnt

_TIMEOUT_S = 300.0


def fetch(batches: Sequence[Any]) -> list[pa.RecordBatch]:
    """What the learner gets of the record batches, with references resolved.

    Those that are here are left as they are.
    """
    fetched: list[pa.RecordBatch] = list(batches)
    if not all(isinstance(batch, pa.RecordBatch) for batch in batches):
        import ray

        fetched = ray.get(list(batches), timeout=_TIMEOUT_S)
    return [learnt(batch) for batch in fetched]


def fetch_scores(scores: Sequence[Any], tokens: int) -> npt.NDArray[np.float32]:
    """What was said of each group as one column of `tokens`, with references resolved.

    Raises:
        RunError: it is of other tokens.
    """
    parts: Sequence[npt.NDArray[np.float32]] = scores
    if not all(isinstance(each, np.ndarray) for each in scores):
        import ray

        parts = ray.get(list(scores), timeout=_TIMEOUT_S)
    column = np.concatenate(parts)
    if len(column) != tokens:
        raise RunError(
            f"the scorer gave {len(column)} log-probabilities for {tokens} tokens: please report it"
        )
    return column


def fetch_ahead(batches: Sequence[Any]) -> None:
    """Have Ray bring these references' batches to this node, and return at once.

    A reference that is lost is no error here: `fetch` will say so, if the batch is ever trained on.
    """
    import ray

    ray.wait(list(batches), num_returns=len(batches), timeout=0, fetch_local=True)
