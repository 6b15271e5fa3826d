"""Groups with verdicts, made of requests and what was said, for tests that sample nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from actors.generation.engine import Completion
from actors.generation.rows import rollout_batch, with_guidance
from actors.sandbox.verdict import Verdict
from actors.verifiers.judge import Judgement
from actors.verifiers.worker import with_verdicts
from common.trajectory import GroupRequest


def request(**changes: Any) -> GroupRequest:
    """A request for two completions of eight tokens at most."""
    values: dict[str, Any] = {
        "group_id": 5,
        "ticket": 5,
        "prompt_id": "p",
        "epoch": 0,
        "question": "2 + 2",
        "prompt_text": "2 + 2 =",
        "prompt_ids": [1, 2],
        "reference": "{}",
        "num_completions": 2,
        "max_tokens": 8,
        "temperature": 1.0,
        "dispatch_version": 3,
        "dispatched_s": 1.0,
    }
    return GroupRequest(**(values | changes))


def said(token_ids: Sequence[int], logprob: float = -0.5) -> Completion:
    """A completion that ended by itself, under version 3."""
    count = len(token_ids)
    return Completion(list(token_ids), [logprob] * count, [3] * count, "stop")


def judged(
    asked: GroupRequest,
    completions: Mapping[int, Completion],
    rewards: Sequence[float | None],
) -> pa.RecordBatch:
    """Completions of a request with one verdict each; a reward of None is an `error`."""
    guidance = list(asked.guidance_ids)
    sampled = {
        index: with_guidance(one, guidance, 3) if asked.num_guided else one
        for index, one in completions.items()
    }
    texts = [" ".join(map(str, one.token_ids)) for one in sampled.values()]
    batch = rollout_batch(asked, sampled, texts, "g")
    verdicts = [
        Verdict("error", None) if reward is None else Verdict.scored(reward) for reward in rewards
    ]
    found = [Judgement(one.reward, (one,)) for one in verdicts]
    return with_verdicts(batch, ["rule"], found)
