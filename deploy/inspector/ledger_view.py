"""What the ledger knows of every group: its tokens, its step, what became of it."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pyarrow as pa

from common.errors import UserError
from common.ledger import BUSY_S

BOOKED = pa.schema(
    [
        pa.field("group_id", pa.int64()),
        pa.field("turn", pa.int64()),
        pa.field("prompt_id", pa.string()),
        pa.field("completions", pa.int64()),
        pa.field("dispatch_version", pa.int32()),
        pa.field("tokens", pa.int64()),  # sampled ones, of all completions in the log
        pa.field("step", pa.int32()),  # the learner step that trained on it, else null
        pa.field("state", pa.string()),  # dispatched | verified | an outcome
    ]
)
_GROUPS = """
SELECT group_id, turn, prompt_id, completions, dispatch_version, tokens, step,
    CASE WHEN state != 'closed' THEN state ELSE
        (SELECT outcome FROM outcomes AS o WHERE o.group_id = g.group_id
         ORDER BY outcome = 'failed' LIMIT 1) END
FROM groups AS g
"""


def read_groups(path: Path) -> pa.Table:
    """Every group of the ledger `path` under `BOOKED`; none when there is no ledger.

    The state of a closed group is its outcome; of one with several, the one that is not `failed`.

    Raises:
        UserError: the file is no ledger.
    """
    rows = _query(path, _GROUPS, ()) if path.is_file() else []
    columns = zip(*rows, strict=True) if rows else [[]] * len(BOOKED)
    return pa.table(
        [pa.array(column, field.type) for column, field in zip(columns, BOOKED, strict=True)],
        schema=BOOKED,
    )


def read_fate(path: Path, group_id: int) -> dict[str, Any]:
    """`outcomes` (completions and tokens by outcome), `again` and `reason` of one group."""
    found = (
        _query(path, "SELECT again, reason FROM groups WHERE group_id = ?", (group_id,))
        if path.is_file()
        else []
    )
    if not found:
        return {"outcomes": {}, "again": False, "reason": ""}
    outcomes = _query(
        path, "SELECT outcome, completions, tokens FROM outcomes WHERE group_id = ?", (group_id,)
    )
    return {
        "outcomes": {
            outcome: {"completions": completions, "tokens": tokens}
            for outcome, completions, tokens in outcomes
        },
        "again": bool(found[0][0]),
        "reason": found[0][1],
    }


def _query(path: Path, statement: str, values: tuple[int, ...]) -> list[tuple[Any, ...]]:
    try:
        uri = f"{path.resolve().as_uri()}?mode=ro"
        with closing(sqlite3.connect(uri, uri=True, timeout=BUSY_S)) as db:
            return db.execute(statement, values).fetchall()
    except sqlite3.Error as error:
        raise UserError(f"{path} cannot be read: {error}") from error
