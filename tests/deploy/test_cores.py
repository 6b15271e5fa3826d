"""Which cores a run may have, on made-up machines."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.config.load import load_config
from deploy.placement import cores
from deploy.placement import options as placement
from deploy.placement.cores import available_cores, core_quota
from deploy.placement.options import plan_cores, plan_here


def siblings(root: Path, lists: dict[int, str]) -> None:
    for core, text in lists.items():
        folder = root / f"sys/devices/system/cpu/cpu{core}/topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(text + "\n")


def put(root: Path, path: str, text: str) -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(text + "\n")


def allow(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(cores.os, "sched_getaffinity", lambda _: set(range(count)))


@pytest.mark.parametrize(
    "lists",
    [
        {core: f"{core % 4},{core % 4 + 4}" for core in range(8)},  # n and n + half
        {core: f"{core // 2 * 2}-{core // 2 * 2 + 1}" for core in range(8)},  # neighbours
    ],
)
def test_generator_and_learner_share_no_physical_core(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lists: dict[int, str]
) -> None:
    siblings(tmp_path, lists)
    allow(monkeypatch, 8)
    found = plan_cores(load_config([], ["model.path=x"]), available_cores(tmp_path), [])
    physical = [
        {lists[core] for core in part[0] or []}
        for part in (found.generator_cores, found.learner_cores)
    ]
    assert len(physical[0]) == len(physical[1]) == 2
    assert not physical[0] & physical[1]


def test_cores_are_in_order_where_nothing_says_who_belongs_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    allow(monkeypatch, 3)
    assert available_cores(tmp_path) == [0, 1, 2]


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({}, None),
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "max 100000"}, None),
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "400000 100000"}, 4),
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "50000 100000"}, 1),
        # A group's own limit, and a tighter one of a group around it.
        (
            {
                "proc/self/cgroup": "1:name=systemd:/x\n0::/pod/box",
                "sys/fs/cgroup/pod/box/cpu.max": "800000 100000",
                "sys/fs/cgroup/pod/cpu.max": "350000 100000",
            },
            3,
        ),
        # Version 1.
        (
            {
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "200000",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
            },
            2,
        ),
        (
            {
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
            },
            None,
        ),
    ],
)
def test_the_quota_is_the_tightest_of_the_control_groups(
    tmp_path: Path, files: dict[str, str], quota: int | None
) -> None:
    for path, text in files.items():
        put(tmp_path, path, text)
    assert core_quota(tmp_path) == quota


def test_under_a_quota_nothing_is_bound_and_threads_are_those_of_the_quota(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    allow(monkeypatch, 64)
    monkeypatch.setattr(placement, "core_quota", lambda: 4)
    found = plan_here(load_config([], ["model.path=x"]), [])
    assert (found.generator_cores, found.learner_cores) == ([None], [None])
    assert (found.generator_threads, found.learner_threads) == (2, 2)
    assert "quota of 4" in found.reason
    monkeypatch.setattr(placement, "core_quota", lambda: 64)
    assert plan_here(load_config([], ["model.path=x"]), []).generator_threads == 32
