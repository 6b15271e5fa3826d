"""Cores of this machine that a run may have: which, in what order, and for how much time."""

from __future__ import annotations

import os
from pathlib import Path

_ROOT = Path("/")


def available_cores(root: Path = _ROOT) -> list[int]:
    """Numbers of the cores that this process may run on.

    Hardware threads of one physical core follow each other, so halves of the list share none.
    """
    allowed = os.sched_getaffinity(0)
    return sorted(allowed, key=lambda core: (_physical(core, root), core))


def _physical(core: int, root: Path) -> int:
    """Number of a physical core: the lowest among its hardware threads."""
    path = root / f"sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list"
    try:
        return int(path.read_text().replace(",", "-").split("-")[0])
    except (OSError, ValueError):  # not Linux, or a sandbox that hides it
        return core


def core_quota(root: Path = _ROOT) -> int | None:
    """Core time that this process's control groups give it, in whole cores; None is no limit.

    `docker --cpus` and Kubernetes' limits set one: all cores are there, but not all the time.
    """
    limits = [*_limits_v2(root), *_limits_v1(root)]
    return max(1, int(min(limits))) if limits else None


def _limits_v2(root: Path) -> list[float]:
    """Limits of this process's group and of all groups around it, in cores."""
    top = root / "sys/fs/cgroup"
    lines = (_text(root / "proc/self/cgroup") or "").splitlines()
    inside = next((line[3:].strip("/") for line in lines if line.startswith("0::")), "")
    group = top / inside
    groups = [group, *group.parents]
    found = []
    for folder in groups[: groups.index(top) + 1]:
        quota, _, period = (_text(folder / "cpu.max") or "max").partition(" ")
        if quota != "max":
            found.append(int(quota) / int(period or 100_000))
    return found


def _limits_v1(root: Path) -> list[float]:
    folder = root / "sys/fs/cgroup/cpu"
    quota, period = _text(folder / "cpu.cfs_quota_us"), _text(folder / "cpu.cfs_period_us")
    return [int(quota) / int(period)] if quota and period and int(quota) > 0 else []


def _text(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None
