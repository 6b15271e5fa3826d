"""Stall reports: armed processes say where they hang; no other gets the signal."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from common.supervision.stacks import descendants, stall_report

ROOT = Path(__file__).resolve().parents[2]
ARMED = """
import subprocess, sys, threading, time
from common.supervision.stacks import arm
arm()
code = "import time; print(1, flush=True); time.sleep(60)"
child = subprocess.Popen([sys.executable, "-c", code])
def hang_here():
    time.sleep(60)
threading.Thread(target=hang_here, daemon=True).start()
hang_here()
"""


def test_an_armed_process_writes_its_stacks_and_another_one_lives_on(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with log.open("w") as errors:
        parent = subprocess.Popen(
            [sys.executable, "-c", ARMED], cwd=ROOT, stdout=subprocess.PIPE, stderr=errors
        )
    try:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"1\n"  # the child, not armed, is up
        below = {process.pid: process for process in descendants(os.getpid())}
        assert parent.pid in below
        (child,) = list(descendants(parent.pid))
        time.sleep(0.2)
        report = stall_report()
        (armed,) = [line for line in report.splitlines() if f" {parent.pid} " in line]
        (other,) = [line for line in report.splitlines() if f" {child.pid} " in line]
        assert armed.endswith("stacks in its log")
        assert "waiting" in armed
        assert not other.endswith("log")
        deadline = time.monotonic() + 10
        while log.read_text().count("in hang_here") < 2:
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        assert parent.poll() is None
        assert child.pid in {process.pid for process in descendants(parent.pid)}
    finally:
        for process in descendants(parent.pid):
            os.kill(process.pid, 9)
        parent.kill()
        parent.wait()
