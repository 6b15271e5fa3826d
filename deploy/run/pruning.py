"""`grpo-lambda prune RUN`: room from a run, without what a resume and the account need.

The newest whole checkpoint is where a resume goes on. What lies behind it goes:

    trajectories/   segments from the oldest on, with their Parquet twins, up to the first that has
                    a group of a later step, or one that is not done with
    credit/         the credit of its steps

The newest segment stays, so that numbers go on. Ledger, metrics, evaluations and checkpoints stay.
Steps whose groups are gone cannot be replayed or looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError
from common.record.credit_log import credit_files
from common.record.parts import logged_tokens
from common.record.pruned import mark_pruned, needed_groups
from common.record.trajectory_log import read_segment, segments
from deploy.inspector.account import log_problems
from deploy.run.directory import LEDGER, RunDirectory


@dataclass(frozen=True)
class Pruning:
    """What would go."""

    step: int
    """Steps up to this one lose their log and credit."""
    files: list[Path]
    tokens: dict[int, int]
    """Tokens of each group that leaves the log."""


def prune(
    path: Path, keep_steps: int, dry: bool, notify: Callable[[str], None]
) -> tuple[Pruning, int]:
    """Remove what lies more than `keep_steps` steps behind the newest whole checkpoint.

    Args:
        dry: find what would go, and remove nothing.

    Returns:
        What went, and its bytes.

    Raises:
        UserError: no run, a run that is being trained, no checkpoint, or a log that contradicts
            the ledger.
        RunError: the ledger cannot be written.
    """
    if keep_steps < 0:
        raise UserError(f"--keep-steps {keep_steps}: give 0 or more")
    if not (path / LEDGER).is_file():
        raise UserError(f"there is no run with a ledger in {path}: give a folder as runs/NAME")
    run = RunDirectory.reopen(str(path))
    try:
        found = _find(run, keep_steps, notify)
        size = sum(file.stat().st_size for file in found.files)
        if not dry and found.files:
            mark_pruned(run.path / LEDGER, found.tokens)
            for file in found.files:
                file.unlink()
    finally:
        run.release()
    return found, size


def describe(found: Pruning, size: int, dry: bool) -> str:
    """A sentence about what went, of `size` bytes."""
    if not found.files:
        return f"nothing to remove of steps up to {found.step}"
    return (
        f"{'would remove' if dry else 'removed'} {len(found.files)} files, {size / 1e6:.1f} MB: "
        f"{len(found.tokens)} groups and the credit of steps up to {found.step}"
    )


def _find(run: RunDirectory, keep_steps: int, notify: Callable[[str], None]) -> Pruning:
    newest = run.newest_checkpoint(notify)
    if newest == 0:
        raise UserError(
            f"{run.path} has no whole checkpoint: a resume begins at step 0 and needs everything"
        )
    if problems := log_problems(run.path):
        raise UserError(
            f"{problems[0]}. The log contradicts the ledger, and what is removed could not be "
            f"looked at again: see inspect {run.path} --ledger"
        )
    step = max(0, newest - keep_steps)
    done, tokens = _done_with(run.path, needed_groups(run.path / LEDGER, step))
    twins = [twin for path in done if (twin := path.with_suffix(".parquet")).is_file()]
    credit = [file for number, file in credit_files(run.path) if number <= step]
    return Pruning(step, [*twins, *done, *credit], tokens)


def _done_with(run: Path, needed: set[int]) -> tuple[list[Path], dict[int, int]]:
    """The oldest segments without a needed group, and the tokens of their groups."""
    done, tokens = [], {}
    for path in segments(run / "trajectories")[:-1]:
        groups = dict(_tokens(path))
        if needed & groups.keys():
            break
        done.append(path)
        tokens.update(groups)
    return done, tokens


def _tokens(segment: Path) -> Iterator[tuple[int, int]]:
    for batch in read_segment(segment):
        yield batch.column("group_id")[0].as_py(), logged_tokens(batch)
