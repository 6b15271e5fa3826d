"""What was taken out of a trajectory log to make room, as the ledger remembers it.

A table of the ledger, `pruned`, has the tokens of every group that is no longer in the log, so that
the account still closes. It is written before a file is removed: after a kill in between, groups
are in both, which is no contradiction.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

from common.errors import RunError
from common.record.ledger import BUSY_S, END_OF_RUN, UNDONE, reading

_TABLE = (
    "CREATE TABLE IF NOT EXISTS pruned"
    " (group_id INTEGER PRIMARY KEY, tokens INTEGER NOT NULL) WITHOUT ROWID"
)


def needed_groups(ledger: Path, step: int) -> set[int]:
    """Groups that a resume from the checkpoint of `step` takes from the log.

    They are those of later steps, those that are not closed, and those that the end of the run has
    cut off.

    Raises:
        UserError: there is no ledger, or the file is not one.
    """
    with reading(ledger) as db:
        rows = db.execute(
            f"SELECT group_id FROM groups WHERE {UNDONE} OR state != 'closed'",
            (step, END_OF_RUN),
        )
        return {group_id for (group_id,) in rows}


def mark_pruned(ledger: Path, tokens: Mapping[int, int]) -> None:
    """Note, on the disk, that these groups leave the log; `tokens` by group.

    Raises:
        RunError: the disk does not take it.
    """
    try:
        with closing(sqlite3.connect(ledger, isolation_level=None, timeout=BUSY_S)) as db:
            db.execute("PRAGMA synchronous = FULL")
            db.execute("BEGIN IMMEDIATE")
            db.execute(_TABLE)
            db.executemany("INSERT OR REPLACE INTO pruned VALUES (?, ?)", [*tokens.items()])
            db.execute("COMMIT")
    except sqlite3.Error as error:
        raise RunError(
            f"the ledger {ledger} cannot be written: {error}. Nothing was removed: make a little "
            "room or mend the disk, then prune again"
        ) from error


def pruned_tokens(ledger: Path) -> dict[int, int]:
    """Tokens of every group that was pruned, by its number.

    Raises:
        UserError: there is no ledger, or the file is not one.
    """
    with reading(ledger) as db:
        known = "SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = 'pruned'"
        if not db.execute(known).fetchone():
            return {}
        return dict(db.execute("SELECT group_id, tokens FROM pruned").fetchall())
