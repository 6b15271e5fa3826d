"""The one Arrow schema of the project: a row is a completion, a logged batch a group.

A *rollout* batch (`rollout_schema`) is what a generator makes: completions of one group. A
*trajectory* batch (`trajectory_schema`) has verdicts and rewards besides. The log holds whole
groups of them, and the learner reads them. List columns run over completion tokens and have equal
lengths within a row.

Guidance tokens (`guidance_length` of them, first in the completion) were not sampled by the
policy: their behaviour log-probability is NaN, and their loss mask is False unless
`algorithm.rollout.guidance.mask` is off.

Shapes: G completions a group; T_i tokens in completion i, the end-of-sequence token included
where the model produced it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

SCHEMA_VERSION = 3
VERSION_KEY = b"grpo_lambda.schema_version"

REWARD_PREFIX = "reward/"
VERDICT_PREFIX = "verdict/"
SUSPICIOUS = "suspicious"
"""The kinds of walls that a completion's program touched, joined by commas; mostly empty. They are
`files`, `kernel`, `network`, `processes` (`actors.sandbox.calls`), and `judge` for a program that
ended what ran it."""

PASS, FAIL, ERROR, TIMEOUT = "pass", "fail", "error", "timeout"
"""Verdicts. `error` and `timeout` carry a null reward, never 0."""

_ROLLOUT_FIELDS: tuple[pa.Field, ...] = (
    pa.field("group_id", pa.int64(), nullable=False),
    pa.field("ticket", pa.int64(), nullable=False),  # see `common.record.ledger`
    pa.field("completion_index", pa.int32(), nullable=False),
    pa.field("prompt_id", pa.string(), nullable=False),
    pa.field("epoch", pa.int32(), nullable=False),
    pa.field("question", pa.string(), nullable=False),  # as the data set has it
    pa.field("prompt_text", pa.string(), nullable=False),  # the question in its template
    pa.field("reference", pa.string(), nullable=False),  # JSON, what the verifiers need
    pa.field("prompt_ids", pa.list_(pa.int32()), nullable=False),
    pa.field("text", pa.string(), nullable=False),
    pa.field("token_ids", pa.list_(pa.int32()), nullable=False),
    pa.field("behaviour_logprobs", pa.list_(pa.float32()), nullable=False),
    pa.field("weight_versions", pa.list_(pa.int32()), nullable=False),
    pa.field("loss_mask", pa.list_(pa.bool_()), nullable=False),
    pa.field("guidance_length", pa.int32(), nullable=False),
    pa.field("finish_reason", pa.string(), nullable=False),  # stop | length
    pa.field("generator", pa.string(), nullable=False),
    pa.field("dispatch_version", pa.int32(), nullable=False),
    pa.field("dispatched_s", pa.float64(), nullable=False),  # Unix time, seconds
    pa.field("finished_s", pa.float64(), nullable=False),
)


def _with_version(fields: Sequence[pa.Field]) -> pa.Schema:
    return pa.schema(fields, metadata={VERSION_KEY: str(SCHEMA_VERSION).encode()})


def rollout_schema() -> pa.Schema:
    """Schema of a group as a generator makes it."""
    return _with_version(_ROLLOUT_FIELDS)


def trajectory_schema(verifiers: Sequence[str]) -> pa.Schema:
    """Schema of a verified group: per verifier a reward and a verdict, then the totals.

    `reward` is the weighted sum and null when any verifier gave `error` or `timeout`;
    such a completion is not trained on.
    """
    fields = list(_ROLLOUT_FIELDS)
    for name in verifiers:
        fields.append(pa.field(REWARD_PREFIX + name, pa.float32()))
        fields.append(pa.field(VERDICT_PREFIX + name, pa.string(), nullable=False))
    fields.append(pa.field("reward", pa.float32()))
    fields.append(pa.field("accuracy", pa.float32()))
    fields.append(pa.field(SUSPICIOUS, pa.string(), nullable=False))
    return _with_version(fields)


def sampled_lengths(batch: pa.RecordBatch) -> npt.NDArray[np.int64]:
    """[G] tokens of each completion that the policy sampled: guidance does not count."""
    lengths_G = pc.subtract(
        pc.list_value_length(batch.column("token_ids")), batch.column("guidance_length")
    )
    return np.asarray(lengths_G.to_numpy(zero_copy_only=False), np.int64)


def check_schema(schema: pa.Schema) -> None:
    """Raise `ValueError` when `schema` was written under another schema version."""
    found = (schema.metadata or {}).get(VERSION_KEY)
    if found != str(SCHEMA_VERSION).encode():
        raise ValueError(
            f"trajectory schema version {found!r}, expected {SCHEMA_VERSION}: "
            "the data were written by another release; read them with that release"
        )
