"""`grpo-lambda inspect RUN --ledger`: the account of a run, checked against its trajectory log."""

from __future__ import annotations

import fcntl
import sqlite3
from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError
from common.record import parts
from common.record.ledger import OUTCOMES, Outcome, reading
from common.record.pruned import pruned_tokens
from common.record.trajectory_log import read_log
from deploy.run.directory import LEDGER

_SHOWN = 20


@dataclass(frozen=True)
class Account:
    """Sums of the ledger, and what is wrong with it."""

    groups: int
    tickets: int
    dispatched: int
    """Completions that generators were asked for."""
    generated: int
    """Tokens in the trajectory log, as each group was logged."""
    completions: dict[Outcome, int]
    tokens: dict[Outcome, int]
    open_groups: int
    open_completions: int
    open_tokens: int
    steps: int
    """Learner steps whose groups are on record."""
    problems: list[str]

    @property
    def closes(self) -> bool:
        """Nothing is open and nothing is wrong."""
        return not self.problems and self.open_groups == 0


def inspect_ledger(run: Path) -> int:
    """Print the account, and return the exit status.

    It is 0 when the account closes, or may yet close because the run goes on.

    Raises:
        UserError: no run, or no ledger, in `run`.
    """
    if not (run / "config.yaml").is_file():
        raise UserError(f"there is no run in {run} (no config.yaml): give a folder as runs/NAME")
    account = account_of(run / LEDGER)
    problems = [*account.problems, *log_problems(run)]
    live = is_live(run)
    print(describe(account, live))
    for problem in problems[:_SHOWN]:
        print(f"  {problem}")
    if len(problems) > _SHOWN:
        print(f"  and {len(problems) - _SHOWN} more")
    if problems:
        print(f"the account does not close: {len(problems)} contradiction(s)")
        return 1
    if account.open_groups and not live:
        print("the account is open: the run was killed; go on with it by resume=")
        return 1
    print("the run goes on" if live else "the account closes")
    return 0


def is_live(run: Path) -> bool:
    """Whether a process is training in this folder."""
    path = run / ".lock"
    if not path.is_file():
        return False
    with path.open() as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def log_problems(run: Path) -> list[str]:
    """List groups whose tokens in the trajectory log are not those of the ledger.

    What `grpo-lambda prune` took out of the log is as it was then. The ledger is read first: what
    is logged meanwhile is no contradiction.
    """
    booked = logged_tokens(run / LEDGER)
    pruned = pruned_tokens(run / LEDGER)
    found: dict[int, int] = {}
    twice = []
    for batch in read_log(run / "trajectories"):
        group_id = batch.column("group_id")[0].as_py()
        if group_id in found:
            twice.append(f"group {group_id} is twice in the log")
        found[group_id] = parts.logged_tokens(batch)
    there = pruned | found
    wrong = [
        f"group {group_id}: {tokens} tokens in the ledger, {there.get(group_id, 0)} in the log"
        for group_id, tokens in booked.items()
        if there.get(group_id, 0) != tokens
    ]
    return twice + wrong


def describe(account: Account, live: bool) -> str:
    """The account as a table."""
    lines = [
        f"{account.groups} groups of {account.tickets} tickets, {account.steps} learner steps",
        "",
        f"{'':<12}{'completions':>12}{'tokens':>14}",
        f"{'dispatched':<12}{account.dispatched:>12}{account.generated:>14}",
    ]
    for outcome in OUTCOMES:
        lines.append(
            f"{outcome:<12}{account.completions[outcome]:>12}{account.tokens[outcome]:>14}"
        )
    if account.open_groups:
        label = "on its way" if live else "open"
        lines.append(f"{label:<12}{account.open_completions:>12}{account.open_tokens:>14}")
    return "\n".join(lines) + "\n"


def account_of(path: Path) -> Account:
    """Add a ledger up and check it. A run may be writing it meanwhile.

    Raises:
        UserError: there is no ledger, or the file is not one.
    """
    with reading(path) as db:
        return _account(db)


def logged_tokens(path: Path) -> dict[int, int]:
    """Tokens of every group that is in the trajectory log, by its number.

    Raises what `account_of` raises.
    """
    with reading(path) as db:
        return dict(db.execute("SELECT group_id, tokens FROM groups WHERE tokens > 0"))


def _account(db: sqlite3.Connection) -> Account:
    groups, tickets, last, dispatched, generated, steps = db.execute(
        "SELECT count(*), count(DISTINCT ticket), max(ticket), coalesce(sum(completions), 0),"
        " coalesce(sum(tokens), 0), count(DISTINCT step) FROM groups"
    ).fetchone()
    opened = db.execute(
        "SELECT count(*), coalesce(sum(completions), 0), coalesce(sum(tokens), 0) FROM groups"
        " WHERE state != 'closed'"
    ).fetchone()
    sums: dict[Outcome, tuple[int, int]] = {
        outcome: (completions, tokens)
        for outcome, completions, tokens in db.execute(
            "SELECT outcome, sum(completions), sum(tokens) FROM outcomes GROUP BY outcome"
        )
    }
    problems = [
        f"group {group}: {completions} completions and {tokens} tokens, its outcomes add up to "
        f"{found} and {found_tokens}"
        for group, completions, tokens, found, found_tokens in db.execute(
            "SELECT g.group_id, g.completions, g.tokens, coalesce(sum(o.completions), 0),"
            " coalesce(sum(o.tokens), 0) FROM groups g LEFT JOIN outcomes o USING (group_id)"
            " WHERE g.state = 'closed' GROUP BY g.group_id"
            " HAVING g.completions != coalesce(sum(o.completions), 0)"
            " OR g.tokens != coalesce(sum(o.tokens), 0)"
        )
    ]
    problems += [
        f"ticket {ticket} has {count} groups that count"
        for ticket, count in db.execute(
            "SELECT ticket, sum(1 - again) FROM groups GROUP BY ticket HAVING sum(1 - again) > 1"
        )
    ]
    if last is not None and last + 1 != tickets:
        problems.append(f"{last + 1 - tickets} of the tickets up to {last} were never served")
    return Account(
        groups=groups,
        tickets=tickets,
        dispatched=dispatched,
        generated=generated,
        completions={name: sums.get(name, (0, 0))[0] for name in OUTCOMES},
        tokens={name: sums.get(name, (0, 0))[1] for name in OUTCOMES},
        open_groups=opened[0],
        open_completions=opened[1],
        open_tokens=opened[2],
        steps=steps,
        problems=problems,
    )
