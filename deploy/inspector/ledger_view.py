"""The ledger's side of the inspector: tokens, step and state of every group."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa

from common.record.ledger import reading

BOOKED = pa.schema(
    [
        pa.field("group_id", pa.int64()),
        pa.field("ticket", pa.int64()),
        pa.field("prompt_id", pa.string()),
        pa.field("completions", pa.int64()),
        pa.field("dispatch_version", pa.int32()),
        pa.field("tokens", pa.int64()),  # sampled ones, of all completions in the log
        pa.field("step", pa.int32()),  # the learner step that trained on it, else null
        pa.field("state", pa.string()),  # dispatched | verified | an outcome
    ]
)
_GROUPS = """
SELECT group_id, ticket, prompt_id, completions, dispatch_version, tokens, step,
    CASE WHEN state != 'closed' THEN state ELSE
        (SELECT outcome FROM outcomes AS o WHERE o.group_id = g.group_id
         ORDER BY outcome IN ('failed', 'compared') + 2 * (outcome IN ('draft', 'probe'))
         LIMIT 1) END
FROM groups AS g
"""


def read_groups(path: Path) -> pa.Table:
    """Every group of the ledger at `path`, under `BOOKED`. Without a ledger there is none.

    The state of a closed group is its outcome; of several, that of what the learner was to get.

    Raises:
        UserError: the file is no ledger.
    """
    rows = []
    if path.is_file():
        with reading(path) as db:
            rows = db.execute(_GROUPS).fetchall()
    columns = zip(*rows, strict=True) if rows else [[]] * len(BOOKED)
    return pa.table(
        [pa.array(column, field.type) for column, field in zip(columns, BOOKED, strict=True)],
        schema=BOOKED,
    )


def read_fate(path: Path, group_id: int) -> dict[str, Any]:
    """What became of one group.

    Returns:
        `outcomes`, completions and tokens by outcome; `again`, whether its ticket is served again;
        `reason`.
    """
    nothing = {"outcomes": {}, "again": False, "reason": ""}
    if not path.is_file():
        return nothing
    of = " WHERE group_id = ?"
    with reading(path) as db:
        group = db.execute(f"SELECT again, reason FROM groups{of}", (group_id,)).fetchone()
        outcomes = db.execute(
            f"SELECT outcome, completions, tokens FROM outcomes{of}", (group_id,)
        ).fetchall()
    if group is None:
        return nothing
    again, reason = group
    return {
        "outcomes": {
            outcome: {"completions": completions, "tokens": tokens}
            for outcome, completions, tokens in outcomes
        },
        "again": bool(again),
        "reason": reason,
    }
