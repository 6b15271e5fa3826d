"""The one Arrow schema of the project: a row is a completion, a logged batch a group.

A *rollout* batch (`rollout_schema`) is what a generator makes: completions of one group. A
*trajectory* batch (`trajectory_schema`) has verdicts and rewards besides. The log holds whole
groups of them, and the learner reads them. List columns run over completion tokens and have equal
lengths within a row.

A group may have parts that were asked for after the verdicts of the first: see
`common.record.parts`.

A completion is one episode. Tokens that were given to the policy have a behaviour log-probability
of NaN (`common.record.turns`), and no place in the loss. Where it is several conversations,
`common.record.segments` says which tokens belong to which. Guidance tokens (`guidance_length` of
them, first in the completion) are given ones that are in the loss where
`algorithm.rollout.guidance.mask` is off.

Shapes: G completions a group; T_i tokens in completion i, the end-of-sequence token included
where the model produced it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from common.record.parts import BRANCH
from common.record.segments import SEGMENT
from common.record.turns import TURN

SCHEMA_VERSION = 10
READABLE = (5, 6, 7, 8, 9, SCHEMA_VERSION)
"""Versions whose data `current` reads."""
VERSION_KEY = b"grpo_lambda.schema_version"

REWARD_PREFIX = "reward/"
VERDICT_PREFIX = "verdict/"
SUSPICIOUS = "suspicious"
"""The kinds of walls that a completion's program touched, joined by commas; mostly empty. They are
`files`, `kernel`, `network`, `processes` (`actors.sandbox.calls`), and `judge` for a program that
ended what ran it."""

CUT = ("length", "turns", "context")
"""Values of `finish_reason` of completions that a limit cut short: that on tokens, on turns, or on
the context of the model. A completion that ended by itself has `stop`."""

PASS, FAIL, ERROR, TIMEOUT = "pass", "fail", "error", "timeout"
"""Verdicts. `error` and `timeout` carry a null reward, never 0."""
SKIPPED = "skipped"
"""The verdict of a rule that does not judge the completion's data set. It has no reward either, and
the total has nothing of it."""

_ROLLOUT_FIELDS: tuple[pa.Field, ...] = (
    pa.field("group_id", pa.int64(), nullable=False),
    pa.field("ticket", pa.int64(), nullable=False),  # see `common.record.ledger`
    pa.field("completion_index", pa.int32(), nullable=False),
    pa.field("prompt_id", pa.string(), nullable=False),
    pa.field("epoch", pa.int32(), nullable=False),
    pa.field("source", pa.string(), nullable=False),  # of several data sets, else empty
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
    pa.field("finish_reason", pa.string(), nullable=False),
    pa.field("turns", pa.list_(pa.field("item", TURN, nullable=False)), nullable=False),
    pa.field("segments", pa.list_(pa.field("item", SEGMENT, nullable=False)), nullable=False),
    pa.field("part", pa.string(), nullable=False),  # of its group, `common.record.parts`
    pa.field("continues", pa.int32(), nullable=False),  # index of the completion that its given
    # first tokens are of, where it is a node of a tree; -1: none
    pa.field("sampled_behind", pa.list_(pa.int32()), nullable=False),  # where not `prompt_ids`
    pa.field("branches", pa.list_(pa.field("item", BRANCH, nullable=False)), nullable=False),
    pa.field("context_ids", pa.list_(pa.int32()), nullable=False),  # `common.config.contexts`
    pa.field("answer_begin", pa.int32(), nullable=False),  # its answer's tokens, where some rule
    pa.field("answer_end", pa.int32(), nullable=False),  # asks for them; both 0: there is none
    pa.field("environment_verdict", pa.string(), nullable=False),
    pa.field("environment_reason", pa.string(), nullable=False),
    pa.field("environment_reward", pa.float32()),
    pa.field("environment_s", pa.float64(), nullable=False),
    pa.field("feedback", pa.string(), nullable=False),  # of its rules, for who is to do better
    pa.field("generator", pa.string(), nullable=False),
    pa.field("dispatch_version", pa.int32(), nullable=False),
    pa.field("dispatched_s", pa.float64(), nullable=False),  # Unix time, seconds
    pa.field("finished_s", pa.float64(), nullable=False),
)
NEWER: dict[str, Any] = {
    "segments": [],
    "part": "",
    "continues": -1,
    "sampled_behind": [],
    "branches": [],
    "context_ids": [],
    "answer_begin": 0,
    "answer_end": 0,
    "feedback": "",
}
"""Columns that an older version may lack, and what stands for them."""
EVERY_LOG_HAS = tuple(field.name for field in _ROLLOUT_FIELDS if field.name not in NEWER)
"""Columns of a group under each version of `READABLE`."""


def _with_version(fields: Sequence[pa.Field]) -> pa.Schema:
    return pa.schema(fields, metadata={VERSION_KEY: str(SCHEMA_VERSION).encode()})


def rollout_schema() -> pa.Schema:
    """Schema of a group as a generator makes it."""
    return _with_version(_ROLLOUT_FIELDS)


def trajectory_schema(verifiers: Sequence[str]) -> pa.Schema:
    """Schema of a verified group: per verifier a reward and a verdict, then the totals.

    `reward` is the weighted sum and null when any verifier gave `error` or `timeout`;
    such a completion is not trained on. `accuracy` is the reward of the first that judged.
    """
    fields = list(_ROLLOUT_FIELDS)
    for name in verifiers:
        fields.append(pa.field(REWARD_PREFIX + name, pa.float32()))
        fields.append(pa.field(VERDICT_PREFIX + name, pa.string(), nullable=False))
    fields.append(pa.field("reward", pa.float32()))
    fields.append(pa.field("accuracy", pa.float32()))
    fields.append(pa.field(SUSPICIOUS, pa.string(), nullable=False))
    return _with_version(fields)


def check_schema(schema: pa.Schema) -> None:
    """Raise `ValueError` when `schema` was written under a version that cannot be read."""
    found = (schema.metadata or {}).get(VERSION_KEY)
    if found not in [str(version).encode() for version in READABLE]:
        raise ValueError(
            f"trajectory schema version {found!r}, expected {SCHEMA_VERSION}: "
            "the data were written by another release; read them with that release"
        )


def damaged_column(schema: pa.Schema) -> str | None:
    """Name of a column that has not its type under any version; None where all have."""
    own = {field.name: field.type for field in _ROLLOUT_FIELDS}
    for field in schema:
        if field.name in own and not _is_of(field.type, own[field.name]):
            return str(field.name)
    return None


def _is_of(found: pa.DataType, own: pa.DataType) -> bool:
    """Whether `found` is `own`, its dictionary, or a list of records with some of its fields."""
    if pa.types.is_dictionary(found):
        found = found.value_type
    if not pa.types.is_list(own) or not pa.types.is_struct(own.value_type):
        return bool(found == own)
    known = {field.name: field.type for field in own.value_type}
    if not pa.types.is_list(found) or not pa.types.is_struct(found.value_type):
        return False
    try:
        return all(known.get(field.name) == field.type for field in found.value_type)
    except UnicodeDecodeError:  # a name that is no text
        return False


def current(batch: pa.RecordBatch) -> pa.RecordBatch:
    """`batch`, of any version that can be read, under today's.

    Version 5 has no segments, version 6 no contexts, version 7 no parts, version 8 no feedback and
    no trees. Branches of version 9 do not say when their probes ended, nor which walls these
    touched. Turns from before tool calls were counted have no number of them.
    """
    own = {field.name: field for field in _ROLLOUT_FIELDS}
    columns = dict(zip(batch.schema.names, batch.columns, strict=True))
    grown = [
        name
        for name in ("turns", "branches")
        if name in columns and columns[name].type != own[name].type
    ]
    if own.keys() <= columns.keys() and not grown:
        return batch
    for name in grown:
        columns[name] = pa.array(columns[name].to_pylist(), own[name].type)
    for name, empty in NEWER.items():
        columns.setdefault(name, pa.array([empty] * batch.num_rows, own[name].type))
    fields = [*_ROLLOUT_FIELDS, *(field for field in batch.schema if field.name not in own)]
    return pa.RecordBatch.from_arrays(
        [columns[field.name] for field in fields], schema=_with_version(fields)
    )
