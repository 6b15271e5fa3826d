"""A run whose disk fills up: it ends with the cause, and goes on when there is room."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
from mounts import remount, small_disk
from run_process import AGENTS, QUICK, check_whole, finish, leftovers, start

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]
KIB = 24 * 1024  # one checkpoint of the tiny preset, not two


def test_a_full_disk_ends_the_run_with_its_cause_and_it_goes_on_with_room(tmp_path: Path) -> None:
    before = set(psutil.pids())
    with small_disk(tmp_path / "disk", KIB) as disk:
        keys = (*QUICK, "checkpoint.keep_last=0", f"runs_dir={disk}", "steps=8")
        process = start("name=run", *keys)
        output = finish(process, 280)
        assert process.returncode == 1, output
        assert "No space left on device" in output, output
        assert leftovers(before, ignored=AGENTS) == []
        remount(disk, "size=2g")
        process = start(f"resume={disk / 'run'}", *keys)
        output = finish(process, 280)
        assert process.returncode == 0, output
        check_whole(disk / "run", 8)
        assert leftovers(before, ignored=AGENTS) == []
