"""The processes below a process, on Linux."""

from __future__ import annotations

import os
from collections.abc import Sequence

_UNSEEN = (FileNotFoundError, ProcessLookupError, PermissionError)
"""The process or thread has ended since, or is hidden from us. Not every OSError: a rule that has
used up the open files must not hide what it started."""


def children(pid: int) -> list[int]:
    """Ids of the processes whose parent is `pid`; empty where there is no /proc."""
    tasks = f"/proc/{pid}/task"
    return [
        int(child)
        for thread in _listed(tasks)
        for child in _read(f"{tasks}/{thread}/children").split()
    ]


def descendants(pid: int, limit: int | None = None) -> list[int]:
    """Ids of all processes below `pid`, children before grandchildren.

    Empty where there is no /proc.

    Args:
        limit: look for no more than this many.
    """
    found, parents = list[int](), [pid]
    while parents and (limit is None or len(found) < limit):
        # The verifiers' child looks after every verdict, and pathlib took it half its time.
        below = children(parents.pop(0))
        found += below
        parents += below
    return found[:limit]


def stat_of(pid: int | str) -> list[str]:
    """What /proc/PID/stat says behind the process's name: see proc(5), from its third field on.

    Raises: `OSError` where there is no such process.
    """
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()


def running() -> int | None:
    """Processes and threads of this machine; None where nobody says."""
    try:
        with open("/proc/loadavg") as file:
            return int(file.read().split()[3].partition("/")[2])
    except (OSError, IndexError, ValueError):
        return None


def memory_of(pids: Sequence[int]) -> int:
    """Bytes of memory that these processes hold together, what several share counted once.

    Where the kernel hides that of another's process (`PSS`), what each has of its own beyond the
    first is counted: a process that was forked shares nearly all of its parent's.
    """
    shares = [_field(_read(f"/proc/{pid}/smaps_rollup"), "Pss:") for pid in pids]
    if None not in shares:
        return sum(share for share in shares if share is not None)
    own = [_field(_read(f"/proc/{pid}/status"), "RssAnon:") or 0 for pid in pids]
    return own[0] + sum(max(0, size - own[0]) for size in own[1:])


def _field(text: str, name: str) -> int | None:
    """A size of `text`, in bytes; None where the kernel did not say."""
    for line in text.splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    return None


def _listed(folder: str) -> list[str]:
    try:
        return os.listdir(folder)
    except _UNSEEN:
        return []


def _read(path: str) -> str:
    try:
        with open(path) as file:
            return file.read()
    except _UNSEEN:
        return ""
