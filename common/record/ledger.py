"""The ledger of a run: what became of every completion that was ever asked for.

A *ticket* is a prompt's place in the endless order of serving; a *group* is one dispatch of a
ticket. Each group goes

    dispatched -> verified -> closed

and is closed once, with outcomes that add up to its completions and tokens:

    trained    in a batch of the learner
    compared   in a batch of the learner, for the others' advantages alone (greedy answers)
    draft      others of its group, asked for after its verdict, were trained on instead
    probe      sampled to measure what the first tokens of another completion are worth
    stale      too old for the staleness bound (only after a resume with a smaller one)
    filtered   sampled and verified, left out by dynamic sampling
    failed     without a reward: a verifier gave `error` or `timeout`
    abandoned  cut off by `generator.group_cap_s`, or lost with the process that sampled it

A group closed with `again` hands its ticket back: the prompt is dispatched anew. "Exactly once"
means two things. Every ticket has one group that is not closed with `again`. And the learner's
surviving steps hold no group twice.

The ledger is SQLite in WAL mode, written by the coordinator alone, read by anybody. A commit
survives the death of the process. A `cut`, at a checkpoint, survives the death of the machine too.
A resume takes back what was recorded behind its checkpoint (`roll_back`).
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from common.errors import RunError, UserError
from common.trajectory import GroupReceipt, GroupRequest

Outcome = Literal[
    "trained", "compared", "draft", "probe", "stale", "filtered", "failed", "abandoned"
]
OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)
Outcomes = Mapping[Outcome, tuple[int, int]]
"""Completions and tokens by outcome."""

END_OF_RUN = "the run ended"
UNDONE = "(step > ? OR reason = ?)"
"""Groups that a resume from a step opens again. The second parameter is `END_OF_RUN`."""
BUSY_S = 30.0
"""How long a reader or writer waits for the other."""

_FORMAT = 1
_TABLES = """
CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE groups (
    group_id INTEGER PRIMARY KEY,
    ticket INTEGER NOT NULL,
    prompt_id TEXT NOT NULL,
    completions INTEGER NOT NULL,
    dispatch_version INTEGER NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('dispatched', 'verified', 'closed')),
    tokens INTEGER NOT NULL DEFAULT 0,
    step INTEGER,
    again INTEGER NOT NULL DEFAULT 0,
    reason TEXT NOT NULL DEFAULT ''
);
CREATE INDEX groups_by_ticket ON groups (ticket, again);
CREATE INDEX groups_open ON groups (group_id) WHERE state != 'closed';
CREATE INDEX groups_by_step ON groups (step) WHERE step IS NOT NULL;
CREATE TABLE outcomes (
    group_id INTEGER NOT NULL REFERENCES groups,
    outcome TEXT NOT NULL,
    completions INTEGER NOT NULL,
    tokens INTEGER NOT NULL,
    PRIMARY KEY (group_id, outcome)
) WITHOUT ROWID;
CREATE TABLE cuts (step INTEGER PRIMARY KEY, unix_s REAL NOT NULL);
"""


@dataclass(frozen=True)
class OpenGroup:
    """A group that is not closed."""

    group_id: int
    ticket: int
    completions: int
    tokens: int


def outcomes_of(receipt: GroupReceipt, outcome: Outcome) -> Outcomes:
    """`outcome` for the completions with a reward, `failed` for those without.

    Of a group that is trained on, those that others are compared with have an outcome of their own.
    So have, of any group, those that the learner does not get by design.
    """
    scored = receipt.num_completions - receipt.num_unscored
    tokens = receipt.num_tokens - receipt.unscored_tokens
    compared = (0, 0)
    if outcome == "trained":
        compared = (receipt.num_compared, receipt.compared_tokens)
    parts: Outcomes = {
        outcome: (scored - compared[0], tokens - compared[1]),
        "compared": compared,
        "draft": (receipt.drafts.completions, receipt.drafts.tokens),
        "probe": (receipt.probes.completions, receipt.probes.tokens),
        "failed": (receipt.num_unscored, receipt.unscored_tokens),
    }
    if outcome == "failed":
        parts = {**parts, "failed": (receipt.num_completions, receipt.num_tokens)}
    return {name: part for name, part in parts.items() if part[0]}


class Ledger:
    """The ledger, opened by its only writer.

    Every method that writes raises `RunError` when the disk does not take it.

    Args:
        path: the SQLite file; it is made when it is not there.
        prompts: identity of the prompts served (`PromptSource.identity`).

    Raises:
        UserError: the ledger belongs to other prompts, or another release wrote it.
    """

    def __init__(self, path: Path, prompts: str) -> None:
        self._path = path
        with self._explained():
            self._db = sqlite3.connect(path, isolation_level=None, timeout=BUSY_S)
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = NORMAL")
            if not self._db.execute("SELECT 1 FROM sqlite_master").fetchone():
                with self._transaction():
                    for statement in _TABLES.split(";"):
                        self._db.execute(statement)
                    facts = [("format", str(_FORMAT)), ("prompts", prompts)]
                    self._db.executemany("INSERT INTO facts VALUES (?, ?)", facts)
        self._check_facts(prompts)

    def _check_facts(self, prompts: str) -> None:
        facts = dict(self._db.execute("SELECT name, value FROM facts"))
        if facts["format"] != str(_FORMAT):
            raise UserError(
                f"{self._path} has format {facts['format']}, this release writes {_FORMAT}: "
                "resume with the release that began the run"
            )
        if facts["prompts"] != prompts:
            raise UserError(
                f"the training prompts are not those of the run (now {prompts}, then "
                f"{facts['prompts']}): resume with the same data, seed, data.order and "
                "eval.prompts, or start a new run"
            )

    def dispatched(self, request: GroupRequest) -> None:
        """Record that a group is about to go out."""
        with self._explained():
            self._db.execute(
                "INSERT INTO groups (group_id, ticket, prompt_id, completions, dispatch_version,"
                " state) VALUES (?, ?, ?, ?, ?, 'dispatched')",
                (
                    request.group_id,
                    request.ticket,
                    request.prompt_id,
                    request.num_completions,
                    request.dispatch_version,
                ),
            )

    def followed_up(self, group_id: int, completions: int) -> None:
        """Record that more of a group is about to go out: so many completions are asked for now."""
        with self._explained():
            self._db.execute(
                "UPDATE groups SET completions = ? WHERE group_id = ?", (completions, group_id)
            )

    def verified(self, group_id: int, tokens: int) -> None:
        """Record that a group is in the trajectory log, with this many sampled tokens."""
        with self._explained():
            self._db.execute(
                "UPDATE groups SET state = 'verified', tokens = ? WHERE group_id = ?",
                (tokens, group_id),
            )

    def close_group(
        self, group_id: int, outcomes: Outcomes, *, again: bool = False, reason: str = ""
    ) -> None:
        """Record how a group ended without being trained on."""
        with self._explained(), self._transaction():
            self._close(group_id, outcomes, None, again, reason)

    def trained(self, step: int, receipts: list[GroupReceipt]) -> None:
        """Record that learner step `step` took these groups."""
        with self._explained(), self._transaction():
            for receipt in receipts:
                self._close(receipt.group_id, outcomes_of(receipt, "trained"), step, False, "")

    def _close(
        self, group_id: int, outcomes: Outcomes, step: int | None, again: bool, reason: str
    ) -> None:
        changed = self._db.execute(
            "UPDATE groups SET state = 'closed', step = ?, again = ?, reason = ?"
            " WHERE group_id = ? AND state != 'closed'",
            (step, again, reason, group_id),
        ).rowcount
        if changed != 1:
            raise RunError(f"group {group_id} was to be closed twice: a defect, please report it")
        self._db.executemany(
            "INSERT INTO outcomes VALUES (?, ?, ?, ?)",
            [(group_id, outcome, *part) for outcome, part in outcomes.items()],
        )

    def cut(self, step: int) -> None:
        """Put the ledger on the disk, for a checkpoint of `step` that is about to be written."""
        with self._explained():
            self._db.execute("PRAGMA synchronous = FULL")
            self._db.execute("INSERT OR REPLACE INTO cuts VALUES (?, ?)", (step, time.time()))
            self._db.execute("PRAGMA synchronous = NORMAL")

    def roll_back(self, step: int) -> list[OpenGroup]:
        """Go back to checkpoint `step`, and return the groups that are open then, by ticket.

        Steps behind it did not happen, so their groups are open again. So are groups that were on
        their way when the run ended.

        Raises:
            UserError: this ledger knows of no such checkpoint.
        """
        if not self._db.execute("SELECT 1 FROM cuts WHERE step = ?", (step,)).fetchone():
            raise UserError(
                f"{self._path} knows of no checkpoint of step {step}: it is not the ledger of "
                "this run; put the right one back, or start a new run from the checkpoint with "
                f"model.path={self._path.parent}/checkpoints/step-{step}"
            )
        undone = f"SELECT group_id FROM groups WHERE {UNDONE}"
        with self._explained(), self._transaction():
            self._db.execute(
                f"DELETE FROM outcomes WHERE group_id IN ({undone})", (step, END_OF_RUN)
            )
            self._db.execute(
                "UPDATE groups SET state = 'verified', step = NULL, again = 0, reason = ''"
                f" WHERE group_id IN ({undone})",
                (step, END_OF_RUN),
            )
            self._db.execute("DELETE FROM cuts WHERE step > ?", (step,))
        return self.open_groups()

    def open_groups(self) -> list[OpenGroup]:
        """Groups that are not closed, by ticket."""
        rows = self._db.execute(
            "SELECT group_id, ticket, completions, tokens FROM groups"
            " WHERE state != 'closed' ORDER BY ticket"
        )
        return [OpenGroup(*row) for row in rows]

    def cursor(self) -> tuple[int, list[int]]:
        """Where serving goes on: the next new ticket, and earlier tickets to serve again."""
        (last,) = self._db.execute("SELECT max(ticket) FROM groups").fetchone()
        again = self._db.execute(
            "SELECT ticket FROM groups GROUP BY ticket HAVING min(again) = 1 ORDER BY ticket"
        )
        return 0 if last is None else last + 1, [ticket for (ticket,) in again]

    def next_group_id(self) -> int:
        """The smallest number that no group of the run has had."""
        (last,) = self._db.execute("SELECT max(group_id) FROM groups").fetchone()
        return 0 if last is None else last + 1

    def end(self) -> None:
        """Abandon what is open and close the file. A resume opens those groups again."""
        with self._explained(), self._transaction():
            for group in self.open_groups():
                lost: Outcomes = {"abandoned": (group.completions, group.tokens)}
                self._close(group.group_id, lost, None, True, END_OF_RUN)
        self._db.close()

    @contextmanager
    def together(self) -> Iterator[None]:
        """What is written inside is committed at its end: all of it, or nothing.

        A commit costs more than what is written of a group. Nobody may act on what is inside before
        the end: only a commit survives the death of the process.
        """
        with self._explained(), self._transaction():
            yield

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        if self._db.in_transaction:
            yield  # a part of `together`
            return
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            if self._db.in_transaction:  # SQLite itself ends it where the disk is full
                self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            if not isinstance(error, sqlite3.OperationalError):
                raise UserError(_damaged(self._path, error)) from error
            raise RunError(
                f"the ledger {self._path} cannot be written: {error}. Make room or mend the "
                "disk, then go on with resume="
            ) from error


def check_ledger(path: Path, step: int) -> None:
    """Look whether a run can go on from `step` with this ledger, before anything is started.

    Raises:
        UserError: there is none, or it is damaged.
    """
    with reading(path) as db:
        try:
            wrong = [text for (text,) in db.execute("PRAGMA quick_check(1)") if text != "ok"]
            db.execute("SELECT name, value FROM facts").fetchall()
            db.execute("SELECT 1 FROM cuts WHERE step = ?", (step,)).fetchall()
        except sqlite3.Error as error:
            raise UserError(_damaged(path, error)) from error
    if wrong:
        raise UserError(_damaged(path, wrong[0].splitlines()[-1]))


def _damaged(path: Path, error: object) -> str:
    return (
        f"the ledger {path} is damaged: {error}. No resume= can go on with it: put a copy of the "
        f"whole run back, or begin a new run with model.path={path.parent}/checkpoints/step-N"
    )


@contextmanager
def reading(path: Path) -> Iterator[sqlite3.Connection]:
    """Open a ledger for reading, as it is at this moment; it may be written meanwhile.

    Raises:
        UserError: there is no ledger, or the file is not one.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist: the run has no ledger; give one that has trained")
    try:
        db = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True, timeout=BUSY_S)
        with closing(db):
            db.execute("BEGIN")  # one state for every query
            yield db
    except sqlite3.Error as error:
        raise UserError(f"{path} cannot be read: {error}") from error
