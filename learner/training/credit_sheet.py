"""What one learner step credits to every token, for the credit log (`common.record.credit_log`).

Every rank collects it micro-batch by micro-batch in the first epoch, when the policy is still the
one before the update. Rank 0 puts it together.

Shapes: B completions of the step, N completion tokens of a micro-batch.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from common.errors import RunError
from common.record.credit_log import credit_schema, write_credit
from learner.algorithm.loss import LossOutput
from learner.algorithm.prepared import Prepared
from learner.policy.packing import PackedRow
from learner.policy.step_batch import StepBatch
from learner.training import fsdp

if TYPE_CHECKING:
    import pyarrow as pa

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class _Seen:
    """Of the tokens of a sequence, or of a completion."""

    logprobs: Floats
    weights: Floats
    advantages: Floats | None
    """None: the advantage of the completion times `weights`."""

    def with_more(self, other: _Seen) -> _Seen:
        """This with what another update credits its tokens with: 0 here, as these are there."""
        advantages = None
        if self.advantages is not None and other.advantages is not None:
            advantages = self.advantages + other.advantages
        return _Seen(self.logprobs, self.weights + other.weights, advantages)


class CreditSheet:
    """Collects the credit of one step: `begin`, `add` for every micro-batch, `record_batch`."""

    def __init__(self) -> None:
        self._batch: StepBatch | None = None
        self._prepared: Prepared | None = None
        self._token_weights_B = torch.zeros(0)
        self._sequences: dict[int, _Seen] = {}

    def begin(self, batch: StepBatch, estimated: Prepared) -> None:
        """Take down the step's data, with the rewards that the recipe was given."""
        self._batch, self._prepared = batch, estimated
        self._token_weights_B = torch.zeros_like(estimated.token_weights_B)

    def add_weights(self, token_weights_B: Tensor) -> None:
        """Take down the token weights of one update; those of other completions are 0.

        The first that a completion has stay, where its tokens have several updates.
        """
        known_B = self._token_weights_B
        self._token_weights_B = torch.where(known_B == 0, token_weights_B, known_B)

    def add(self, row: PackedRow, mask_N: Tensor, logprobs_N: Tensor, output: LossOutput) -> None:
        """Take down a micro-batch: log-probabilities, and credit of the tokens in the loss.

        Where tokens of a completion have several updates, its log-probabilities are those of the
        first, and every update adds the credit of its tokens.
        """

        def everywhere(credit_M: Tensor) -> Floats:
            values_N = torch.full_like(logprobs_N, torch.nan)
            values_N[mask_N] = credit_M.to(values_N.dtype)
            return values_N.float().cpu().numpy()

        logprobs, weights = logprobs_N.float().cpu().numpy(), everywhere(output.credit_N)
        given = None if output.advantages_N is None else everywhere(output.advantages_N)
        start = 0
        for sequence, length in zip(row.completions, row.lengths, strict=True):
            own = slice(start, start + length)
            found = _Seen(logprobs[own], weights[own], None if given is None else given[own])
            known = self._sequences.get(sequence)
            self._sequences[sequence] = found if known is None else known.with_more(found)
            start += length

    def write(self, run: Path, step: int, groups: Sequence[pa.RecordBatch]) -> float:
        """Write the credit log of `step`; returns the seconds that took. Collective.

        Raises:
            RunError: the disk does not take it.
        """
        started = time.perf_counter()
        rows = self.record_batch(step, groups)
        if rows is not None:
            try:
                write_credit(run, step, rows)
            except OSError as error:
                raise RunError(
                    f"the credit log of step {step} cannot be written: {error}. Make room or mend "
                    "the disk, then go on with resume= (learner.credit_log_every=0 does without)"
                ) from error
        return time.perf_counter() - started

    def record_batch(self, step: int, groups: Sequence[pa.RecordBatch]) -> pa.RecordBatch | None:
        """The rows of all ranks, on rank 0; None on the others. Collective.

        Args:
            groups: the record batches that the step's `StepBatch` was read from.
        """
        import pyarrow as pa

        parts = fsdp.gather_objects(self._sequences)
        if torch.distributed.get_rank() != 0:
            return None
        assert self._batch is not None
        assert self._prepared is not None
        every_sequence = {index: found for part in parts for index, found in part.items()}
        seen = _by_completion(every_sequence, self._batch)
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
                _credited(seen[i], advantages_B[i]) if i in seen else None for i in every
            ],
            "logprobs": [seen[i].logprobs if i in seen else None for i in every],
            "scores": [_of_tokens(self._batch.scores, self._batch, i) for i in every],
            "values": [_of_tokens(self._batch.values, self._batch, i) for i in every],
        }
        schema = credit_schema()
        arrays = [pa.array(columns[field.name], field.type) for field in schema]
        return pa.RecordBatch.from_arrays(arrays, schema=schema)


def _by_completion(seen: Mapping[int, _Seen], batch: StepBatch) -> dict[int, _Seen]:
    """The tokens of completions from those of their sequences, which trained all or none."""
    parts: dict[int, list[_Seen]] = {}
    for sequence in sorted(seen):
        completion = int(batch.sequences.completion_S[sequence])
        parts.setdefault(completion, []).append(seen[sequence])
    return {completion: _joined(found) for completion, found in parts.items()}


def _joined(parts: Sequence[_Seen]) -> _Seen:
    given = [part.advantages for part in parts if part.advantages is not None]
    return _Seen(
        np.concatenate([part.logprobs for part in parts]),
        np.concatenate([part.weights for part in parts]),
        np.concatenate(given) if given else None,
    )


def _credited(seen: _Seen, advantage: float) -> Floats:
    """What every token is credited with, [T]."""
    if seen.advantages is not None:
        return seen.advantages
    return (advantage * seen.weights).astype(np.float32)


def _of_tokens(column: Floats | None, batch: StepBatch, completion: int) -> Floats | None:
    return None if column is None else column[batch.tokens_of(completion)]


def _column(groups: Sequence[pa.RecordBatch], name: str) -> npt.NDArray[Any]:
    return np.concatenate([group.column(name).to_numpy() for group in groups])
