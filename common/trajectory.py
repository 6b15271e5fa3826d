"""What the control plane passes around: requests and receipts, never tokens of completions.

The tokens travel as Arrow record batches (`common.record.schema`) behind object references.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from common.supervision.calls import Ref

if TYPE_CHECKING:
    import pyarrow as pa


def ticket_seed(seed: int, ticket: int) -> int:
    """Seed of the samples of a ticket, or of an evaluation's problem; sample i adds i."""
    digest = hashlib.sha256(f"{seed}/{ticket}".encode()).digest()
    return int.from_bytes(digest[:6])


@dataclass(frozen=True)
class GroupRequest:
    """Sample `num_completions` completions of one prompt."""

    group_id: int
    ticket: int
    """The prompt's place in the order of serving, over all epochs; -1 outside training."""
    prompt_id: str
    epoch: int
    question: str
    prompt_text: str
    """The question in its template."""
    prompt_ids: list[int]
    reference: str
    num_completions: int
    max_tokens: int
    temperature: float
    dispatch_version: int
    """Version every live generator held when the group was dispatched."""
    dispatched_s: float
    guidance_ids: tuple[int, ...] = ()
    """First tokens of a reference solution; they lead the last `num_guided` completions."""
    num_guided: int = 0
    mask_guidance: bool = True
    seed: int | None = None
    """Seed of this group's samples; None leaves them to the engine's random state."""
    cap_s: float | None = None
    """Seconds after which completions still being sampled are aborted and left out."""


@dataclass(frozen=True)
class GroupReceipt:
    """A verified group that is in the trajectory log."""

    group_id: int
    ticket: int
    batch_ref: Ref[pa.RecordBatch] | None
    """The group's record batch; None as long as only the log's client knows it."""
    dispatch_version: int
    min_version: int
    """Oldest weight version any token was sampled with."""
    max_version: int
    """Newest weight version any token was sampled with."""
    num_completions: int
    num_tokens: int
    """Tokens that were sampled: guidance does not count."""
    reward_mean: float
    rewards_equal: bool
    """Whether all completions have the same reward, so that the group carries no advantage."""
    num_unscored: int
    """Completions whose verdict was `error` or `timeout`."""
    unscored_tokens: int
    """Tokens of these completions."""
    generate_s: float
    """Seconds from dispatch to the last completion."""
    suspicious: tuple[str, ...] = ()
    """One entry a completion that touched a wall of the sandbox: the kinds, joined by commas."""

    @property
    def unjudged(self) -> bool:
        """Whether no completion has a reward."""
        return self.num_unscored == self.num_completions


def batch_refs(receipts: Iterable[GroupReceipt]) -> list[Ref[pa.RecordBatch]]:
    """The record batches of groups.

    Raises:
        ValueError: a receipt is not complete: the trajectory log's client completes them.
    """
    refs = []
    for receipt in receipts:
        if receipt.batch_ref is None:
            raise ValueError(f"the receipt of group {receipt.group_id} has no batch_ref")
        refs.append(receipt.batch_ref)
    return refs
