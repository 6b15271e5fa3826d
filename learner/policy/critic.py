"""The critic: a model of the policy's architecture that says what every state is worth.

It reads a packed row as the policy does. `ValueHead` stands where the output embedding was, and
gives one number for the state before each scored token. The head begins at 0, as nothing is known.

Shapes: T packed rows, N scored tokens, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from learner.policy.model import Policy
from learner.policy.packing import PackedRow


class ValueHead(nn.Module):
    """Output embedding that returns [1, N, 1]: the value of the rows that were asked for."""

    def __init__(self, hidden_size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(hidden_size, dtype=dtype))  # [H]
        self._rows_N: Tensor | None = None

    @contextmanager
    def requested(self, rows_N: Tensor) -> Iterator[None]:
        """Have the forward passes inside this block judge the states at `rows_N`."""
        self._rows_N = rows_N
        try:
            yield
        finally:
            self._rows_N = None

    def forward(self, hidden_1TH: Tensor) -> Tensor:
        if self._rows_N is None:
            raise RuntimeError("ValueHead ran outside `requested`: nothing says what to judge")
        hidden_NH = hidden_1TH[0].index_select(0, self._rows_N)
        # bfloat16 would round a value to three digits: the sum is in float32.
        values_N = (hidden_NH.float() * self.weight.float()).sum(-1)
        # Not a view: FSDP hangs its backward hook on this very tensor.
        return torch.stack((values_N[None],), dim=-1)


class Critic:
    """A loaded policy whose head is taken for one that values.

    Attributes:
        policy: the model, to shard and to save; its `logprobs` are gone.
    """

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.head = ValueHead(policy.hidden_size, policy.head.weight.dtype)
        policy.model.set_output_embeddings(self.head)

    def values(self, row: PackedRow) -> Tensor:
        """Value of the state before each of the row's N completion tokens, [N] float32."""
        with self.head.requested(row.predictor_rows_M):
            return row.of_tokens(self.policy.outputs(row)[0])[:, 0]
