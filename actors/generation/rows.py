"""Completions of a group as rows of the rollout schema."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from typing import Any

import pyarrow as pa

from actors.generation.engine import Completion
from actors.generation.episodes import as_episode
from common.record.parts import PROBE
from common.record.schema import rollout_schema
from common.trajectory import GroupRequest


def with_guidance(sampled: Completion, guidance_ids: list[int], version: int) -> Completion:
    """Put guidance, which the policy did not sample, before a sampled completion.

    Guidance tokens have no behaviour log-probability (NaN). They carry the version of the first
    sampled token, or `version` when none was sampled.
    """
    count = len(guidance_ids)
    return Completion(
        token_ids=guidance_ids + sampled.token_ids,
        logprobs=[math.nan] * count + sampled.logprobs,
        weight_versions=(sampled.weight_versions[:1] or [version]) * count
        + sampled.weight_versions,
        finish_reason=sampled.finish_reason,
        guidance_length=count,
    )


def rollout_batch(
    request: GroupRequest,
    sampled: dict[int, Completion],
    texts: list[str],
    generator: str,
    contexts: Sequence[Sequence[int]] = (),
    spans: Sequence[tuple[int, int]] = (),
) -> pa.RecordBatch:
    """Completions of a request, by their index in it, as one record batch.

    Args:
        contexts: token ids of what a scorer reads before each; none where nobody asked for any.
        spans: tokens [begin, end) of the answer of each, likewise.
    """
    completions = list(sampled.values())
    episodes = [as_episode(completion) for completion in completions]
    count = len(completions)
    columns: dict[str, list[Any]] = {
        "group_id": [request.group_id] * count,
        "ticket": [request.ticket] * count,
        "completion_index": _indices(request, sampled),
        "prompt_id": [request.prompt_id] * count,
        "epoch": [request.epoch] * count,
        "source": [request.source] * count,
        "question": [request.question] * count,
        "prompt_text": [request.prompt_text] * count,
        "reference": [request.reference] * count,
        "prompt_ids": [request.prompt_ids] * count,
        "text": texts,
        "token_ids": [completion.token_ids for completion in completions],
        "behaviour_logprobs": [completion.logprobs for completion in completions],
        "weight_versions": [completion.weight_versions for completion in completions],
        "loss_mask": [_loss_mask(request, index, said) for index, said in sampled.items()],
        "guidance_length": [completion.guidance_length for completion in completions],
        "finish_reason": [completion.finish_reason for completion in completions],
        "turns": [list(each.turns) for each in episodes],
        "segments": [list(each.segments) for each in episodes],
        "part": [request.part] * count,
        "continues": [-1 if request.continues is None else request.continues] * count,
        "sampled_behind": [request.sampled_behind] * count,
        "branches": [[]] * count,
        "context_ids": list(contexts) or [[]] * count,
        "answer_begin": [begin for begin, _ in spans] or [0] * count,
        "answer_end": [end for _, end in spans] or [0] * count,
        "environment_verdict": [each.environment_verdict for each in episodes],
        "environment_reason": [each.environment_reason for each in episodes],
        "environment_reward": [each.environment_reward for each in episodes],
        "environment_s": [each.environment_s for each in episodes],
        "feedback": [""] * count,  # a verifier's
        "generator": [generator] * count,
        "dispatch_version": [request.dispatch_version] * count,
        "dispatched_s": [request.dispatched_s] * count,
        "finished_s": [time.time()] * count,
    }
    schema = rollout_schema()
    arrays = [pa.array(columns[field.name], type=field.type) for field in schema]
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def is_greedy(request: GroupRequest, index: int) -> bool:
    """Whether the completion is there for others to compare with alone."""
    return request.greedy and index == 0


def _indices(request: GroupRequest, sampled: Iterable[int]) -> list[int]:
    """Indices in the group; probes have that of the completion that they continue."""
    if request.part == PROBE and request.continues is not None:
        return [request.continues for _ in sampled]
    return [request.first_index + index for index in sampled]


def _loss_mask(request: GroupRequest, index: int, completion: Completion) -> list[bool]:
    """What was sampled is in the loss, and guidance where it is not to be masked.

    Of a completion that others are compared with nothing is.
    """
    if is_greedy(request, index):
        return [False] * len(completion.token_ids)
    guided = completion.guidance_length
    sampled = [not math.isnan(logprob) for logprob in completion.logprobs]
    return [not request.mask_guidance] * guided + sampled[guided:]
