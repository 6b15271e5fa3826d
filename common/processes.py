"""The processes below a process, on Linux."""

from __future__ import annotations

from pathlib import Path


def descendants(pid: int) -> list[int]:
    """Process ids below `pid`, children before grandchildren; none where there is no /proc."""
    found: list[int] = []
    for listing in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = [int(child) for child in listing.read_text().split()]
        except OSError:  # the process or the thread has just ended
            continue
        for child in children:
            found += [child, *descendants(child)]
    return found
