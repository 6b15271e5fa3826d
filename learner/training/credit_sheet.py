"""What one learner step credits to every token, for the credit log (`common.record.credit_log`).

Every rank collects it micro-batch by micro-batch in the first epoch, when the policy is still the
one before the step. Rank 0 puts it together.

Shapes: B completions of the step, N completion tokens of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from common.record.credit_log import credit_schema
from learner.algorithm.recipe import Prepared
from learner.policy.packing import PackedRow, StepBatch
from learner.training import fsdp

if TYPE_CHECKING:
    import pyarrow as pa

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class _Completion:
    logprobs: Floats
    weights: Floats


class CreditSheet:
    """Collects the credit of one step: `begin`, `add` for every micro-batch, `record_batch`."""

    def __init__(self) -> None:
        self._batch: StepBatch | None = None
        self._prepared: Prepared | None = None
        self._token_weights_B = torch.zeros(0)
        self._completions: dict[int, _Completion] = {}

    def begin(self, batch: StepBatch, estimated: Prepared) -> None:
        """Take down the step's data, with the rewards that the recipe was given."""
        self._batch, self._prepared = batch, estimated
        self._token_weights_B = torch.zeros_like(estimated.token_weights_B)

    def add_weights(self, token_weights_B: Tensor) -> None:
        """Take down the token weights of one update; those of other completions are 0."""
        self._token_weights_B = self._token_weights_B + token_weights_B

    def add(self, row: PackedRow, mask_N: Tensor, logprobs_N: Tensor, credit_M: Tensor) -> None:
        """Take down a micro-batch: log-probabilities, and credit of the M tokens in the loss."""
        weights_N = torch.full_like(logprobs_N, torch.nan)
        weights_N[mask_N] = credit_M.to(weights_N.dtype)
        start = 0
        logprobs, weights = (x.float().cpu().numpy() for x in (logprobs_N, weights_N))
        for completion, length in zip(row.completions, row.lengths, strict=True):
            stop = start + length
            self._completions[completion] = _Completion(logprobs[start:stop], weights[start:stop])
            start = stop

    def record_batch(self, step: int, groups: Sequence[pa.RecordBatch]) -> pa.RecordBatch | None:
        """The rows of all ranks, on rank 0; None on the others. Collective.

        Args:
            groups: the record batches that the step's `StepBatch` was read from.
        """
        import pyarrow as pa

        parts = fsdp.gather_objects(self._completions)
        if torch.distributed.get_rank() != 0:
            return None
        assert self._batch is not None
        assert self._prepared is not None
        seen = {index: found for part in parts for index, found in part.items()}
        advantages_B = self._prepared.advantages_B.numpy()
        every = range(len(advantages_B))
        columns: dict[str, Any] = {
            "step": np.full(len(every), step, np.int32),
            **{name: _column(groups, name) for name in ("group_id", "ticket", "completion_index")},
            "reward": pa.array(self._batch.rewards_B, pa.float32(), from_pandas=True),
            "advantage": advantages_B,
            "token_weight": self._token_weights_B.numpy(),
            "trained": self._prepared.trained_B.numpy(),
            "trace_weights": [seen[i].weights if i in seen else None for i in every],
            "advantages": [
                (advantages_B[i] * seen[i].weights).astype(np.float32) if i in seen else None
                for i in every
            ],
            "logprobs": [seen[i].logprobs if i in seen else None for i in every],
        }
        schema = credit_schema()
        arrays = [pa.array(columns[field.name], field.type) for field in schema]
        return pa.RecordBatch.from_arrays(arrays, schema=schema)


def _column(groups: Sequence[pa.RecordBatch], name: str) -> npt.NDArray[Any]:
    return np.concatenate([group.column(name).to_numpy() for group in groups])
