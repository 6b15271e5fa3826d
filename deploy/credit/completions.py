"""The completions of a step that are branched, read from the trajectory log."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

import pyarrow as pa

from actors.data.prompts import Prompt
from common.errors import UserError


@dataclass(frozen=True)
class Sampled:
    """A completion as the log has it."""

    group_id: int
    index: int
    prompt: Prompt
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    reward: float
    first: int
    """Tokens at its start that were given: guidance, or what an environment said first."""
    row: Mapping[str, Any] = field(repr=False)
    """All that the log has of it."""

    @property
    def key(self) -> tuple[int, int]:
        """By which the credit log knows it."""
        return self.group_id, self.index


def policy_version(groups: Sequence[pa.RecordBatch]) -> int:
    """The version that sampled most completions of a step from their first to their last token.

    Raises: `UserError` where the weights changed inside every completion.
    """
    versions = Counter(
        row["weight_versions"][0] for row in _rows(groups) if len(set(row["weight_versions"])) == 1
    )
    if not versions:
        raise UserError(
            "every completion of the step was sampled under several versions of the weights, so no "
            "policy is theirs: take another step, or a run with generator.max_staleness=0"
        )
    return versions.most_common(1)[0][0]


def chosen(groups: Sequence[pa.RecordBatch], version: int, most: int) -> list[Sampled]:
    """Completions of `version` that have a reward: the first of each group, then the second, ...

    Raises: `UserError` where there is none.
    """
    usable = [[_sampled(r) for r in _rows([g]) if _is_usable(r, version)] for g in groups]
    found = [each for turn in zip_longest(*usable) for each in turn if each is not None]
    if not found:
        raise UserError(
            f"no completion of the step was sampled by version {version} alone and has a reward"
        )
    return found[:most]


def _is_usable(row: dict[str, Any], version: int) -> bool:
    sampled = any(turn["begin"] < turn["end"] for turn in row["turns"])
    return sampled and row["reward"] is not None and set(row["weight_versions"]) == {version}


def _rows(groups: Sequence[pa.RecordBatch]) -> Iterator[dict[str, Any]]:
    for group in groups:
        yield from group.to_pylist()


def _sampled(row: dict[str, Any]) -> Sampled:
    prompt = Prompt(
        ticket=-1,
        prompt_id=row["prompt_id"],
        index=0,
        epoch=row["epoch"],
        question=row["question"],
        text=row["prompt_text"],
        token_ids=row["prompt_ids"],
        reference=row["reference"],
        solution=None,
        difficulty=None,
        source=row["source"],
    )
    return Sampled(
        row["group_id"],
        row["completion_index"],
        prompt,
        tuple(row["token_ids"]),
        tuple(math.nan if p is None else p for p in row["behaviour_logprobs"]),
        float(row["reward"]),
        next(turn["begin"] for turn in row["turns"] if turn["begin"] < turn["end"]),
        row,
    )


def digest_of(completions: Sequence[Sampled], points: Sequence[Sequence[int]]) -> str:
    """Tells one choice of completions and branches from another."""
    import hashlib

    said = [
        (each.key, each.token_ids, list(places))
        for each, places in zip(completions, points, strict=True)
    ]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()[:16]
