"""Queries to the table of groups, answered by Arrow compute."""

from __future__ import annotations

from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, ConfigDict, Field

from common.record.episodes import ENDS

Column = Literal[
    "group",
    "step",
    "question",
    "reward",
    "spread",
    "length",
    "turns",
    "tool_errors",
    "staleness",
    "state",
    "completions",
]
End = Literal["", "stop", "length", "turns", "context", "error", "timeout"]
"""How an episode ended (`common.record.episodes.ENDS`); empty: anyhow."""
COLUMNS: dict[Column, str] = {
    "group": "group_id",
    "step": "step",
    "question": "question",
    "reward": "reward_mean",
    "spread": "reward_std",
    "length": "length",
    "turns": "turns",
    "tool_errors": "tool_errors",
    "staleness": "staleness",
    "state": "state",
    "completions": "completions",
}
"""The column of the Arrow table that a column of the page shows."""
RANGES: tuple[Column, ...] = ("reward", "length", "turns", "tool_errors", "staleness", "step")
PAGE_SIZE, LARGEST_PAGE = 50, 500
EXCERPT = (50, 110)
"""Characters of a long question that a row shows, from its beginning and from its end. Many data
sets begin every question with the same words."""

Bound = Field(None, allow_inf_nan=False)


class GroupQuery(BaseModel):
    """How the table is sorted, filtered and cut into pages. Bounds are inclusive."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sort: Column = "group"
    descending: bool = False
    page: int = Field(1, ge=1, le=10**9)
    size: int = Field(PAGE_SIZE, ge=1, le=LARGEST_PAGE)
    text: str = Field("", max_length=200)
    reward_min: float | None = Bound
    reward_max: float | None = Bound
    length_min: float | None = Bound
    length_max: float | None = Bound
    turns_min: float | None = Bound
    turns_max: float | None = Bound
    tool_errors_min: float | None = Bound
    tool_errors_max: float | None = Bound
    end: End = ""
    """Groups with an episode that ended so."""
    staleness_min: float | None = Bound
    staleness_max: float | None = Bound
    step_min: float | None = Bound
    step_max: float | None = Bound


def select(groups: pa.Table, query: GroupQuery) -> pa.Table:
    """The groups within every range and with the end, sorted; last those without what is sorted.

    A group without a value is in no range over it. Ties are in the order of the group.
    """
    for name in RANGES:
        column = groups[COLUMNS[name]]
        low, high = getattr(query, f"{name}_min"), getattr(query, f"{name}_max")
        if low is not None:
            groups = groups.filter(pc.greater_equal(column, low))
            column = groups[COLUMNS[name]]
        if high is not None:
            groups = groups.filter(pc.less_equal(column, high))
    if query.end:
        bit = pa.scalar(1 << ENDS.index(query.end))
        groups = groups.filter(pc.not_equal(pc.bit_wise_and(groups["ended"], bit), 0))
    order = "descending" if query.descending else "ascending"
    keys = [(COLUMNS[query.sort], order)]
    if query.sort != "group":
        keys.append(("group_id", "ascending"))
    if query.sort == "question":
        place = groups.schema.get_field_index("question")
        groups = groups.set_column(place, "question", groups["question"].cast(pa.string()))
    return groups.take(pc.sort_indices(groups, sort_keys=keys))


def rows(groups: pa.Table) -> list[dict[str, Any]]:
    """Rows of the page's table, with long questions cut to an excerpt."""
    shown: dict[str, Any] = {name: groups[column] for name, column in COLUMNS.items()}
    shown["scored"] = groups["scored"]
    shown["logged"] = pc.is_valid(groups["segment"])
    shown["ends"] = groups["ended"]
    found: list[dict[str, Any]] = pa.table(shown).to_pylist()
    return [
        row | {"question": _excerpt(row["question"]), "ends": _ends(row["ends"])} for row in found
    ]


def _ends(bits: int | None) -> list[str]:
    """The names of ends that a row of the index has as bits."""
    return [name for place, name in enumerate(ENDS) if (bits or 0) >> place & 1]


def _excerpt(text: str | None) -> str | None:
    head, tail = EXCERPT
    if text is None or len(text) <= head + tail:
        return text
    return f"{text[:head]} … {text[-tail:]}"


def page_of(groups: pa.Table, query: GroupQuery) -> pa.Table:
    """The rows of one page. Pages behind the last have none."""
    return groups.slice((query.page - 1) * query.size, query.size)
