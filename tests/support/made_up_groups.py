"""Made-up requests, groups and receipts, for tests that sample nothing."""

from __future__ import annotations

import pyarrow as pa

from actors.generation.engine import Completion
from actors.generation.rows import rollout_batch
from common.trajectory import GroupReceipt, GroupRequest


def receipt(group_id: int, dispatched_at: int, oldest_token: int) -> GroupReceipt:
    """A group of two completions, all of whose tokens are of the version `oldest_token`."""
    return GroupReceipt(
        group_id=group_id,
        ticket=group_id,
        batch_ref=None,
        dispatch_version=dispatched_at,
        min_version=oldest_token,
        max_version=oldest_token,
        num_completions=2,
        num_tokens=10,
        reward_mean=0.5,
        rewards_equal=False,
        num_unscored=0,
        unscored_tokens=0,
        generate_s=1.0,
    )


def group(group_id: int, tokens: int = 3) -> pa.RecordBatch:
    """Two completions under the rollout schema, one of `tokens` tokens and one of a single one."""
    request = GroupRequest(
        group_id=group_id,
        ticket=group_id,
        prompt_id=f"p{group_id}",
        epoch=0,
        question="1 + 1",
        prompt_text="1 + 1 =",
        prompt_ids=[1, 2, 3],
        reference="{}",
        num_completions=2,
        max_tokens=8,
        temperature=1.0,
        dispatch_version=4,
        dispatched_s=100.0,
    )
    completions = {
        0: Completion([7] * tokens, [-0.5] * tokens, [4] * (tokens - 1) + [5], "stop"),
        1: Completion([8], [-1.5], [4], "length"),
    }
    return rollout_batch(request, completions, ["a", "b"], "generator-0")


def request(group_id: int, ticket: int, version: int = 0) -> GroupRequest:
    """A request for two completions."""
    return GroupRequest(
        group_id, ticket, f"p{ticket}", 0, "?", "?", [1], "{}", 2, 8, 1.0, version, 0.0
    )


def request_for(batch: pa.RecordBatch) -> GroupRequest:
    """The request that `batch` could be the answer to, with the ticket as the group's number."""
    ticket = batch.column("ticket")[0].as_py()
    version = batch.column("dispatch_version")[0].as_py()
    return GroupRequest(
        ticket, ticket, str(ticket), 0, "", "", [], "{}", batch.num_rows, 32, 1.0, version, 0.0
    )
