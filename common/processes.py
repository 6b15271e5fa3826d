"""The processes below a process, on Linux."""

from __future__ import annotations

from pathlib import Path


def descendants(pid: int, limit: int | None = None) -> list[int]:
    """Process ids below `pid`, children before grandchildren; none where there is no /proc.

    With a `limit` no more than so many are looked for.
    """
    found, parents = list[int](), [pid]
    while parents and (limit is None or len(found) < limit):
        for listing in Path(f"/proc/{parents.pop(0)}/task").glob("*/children"):
            try:
                children = [int(child) for child in listing.read_text().split()]
            except OSError:  # the process or the thread has just ended
                continue
            found += children
            parents += children
    return found[:limit]
