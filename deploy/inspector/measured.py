"""What `grpo-lambda credit` measured of a group's completions, for the page."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from common.errors import first_line
from deploy.credit.files import FOLDER, SEGMENTS, measured_path

Segments = list[dict[str, Any]]
"""The segments of a completion in their order; null where a number is not known."""

_SHOWN = ("begin", "end", "continuations")
_NUMBERS = ("value", "value_error", "advantage", "advantage_error")


def group_values(run: Path, group_id: int, step: int | None) -> tuple[dict[int, Segments], str]:
    """Measured segments by completion index, and what is wrong with the file, if anything is.

    Without a measure there are none, and nothing is wrong.
    """
    if step is None:
        return {}, ""
    path = measured_path(run, step) / SEGMENTS
    if not path.is_file():
        return {}, ""
    names = ["completion_index", *_SHOWN, *_NUMBERS]
    try:
        table = pa.parquet.read_table(path, columns=names, filters=[("group_id", "==", group_id)])
        rows = table.select(names).to_pylist()
    except (pa.ArrowException, OSError, KeyError) as error:
        return {}, f"{path} cannot be read, so no value is shown: {first_line(error)}"
    found: dict[int, Segments] = {}
    for row in sorted(rows, key=lambda row: int(row["begin"])):
        numbers = {name: _known(row[name]) for name in _NUMBERS}
        found.setdefault(row["completion_index"], []).append(
            {name: row[name] for name in _SHOWN} | numbers
        )
    return found, ""


def values_of_branches(branches: Segments, length: int, reward: float | None) -> Segments | None:
    """What branches have measured while the run trained, as segments; None where none has a value.

    Args:
        branches: entries of the column `branches` of a completion.
        length: its tokens.
        reward: its own; the value behind its last segment.
    """
    known = [branch for branch in branches if branch["count"]]
    after = [
        *((each["at"], each["value"], each["error"]) for each in known[1:]),
        (length, reward, 0.0),
    ]
    found = []
    for branch, (end, value, error) in zip(known, after, strict=False):
        errors = (branch["error"], error)
        found.append(
            {
                "begin": branch["at"],
                "end": end,
                "continuations": branch["count"],
                "value": branch["value"],
                "value_error": branch["error"],
                "advantage": None if value is None else value - branch["value"],
                "advantage_error": None if None in errors else math.hypot(*errors),
            }
        )
    return found or None


def measured_files(run: Path) -> list[Path]:
    """The files of all steps that were measured."""
    return sorted((run / FOLDER).glob(f"step-*/{SEGMENTS}"))


def _known(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
