"""Who hangs, and where: the processes of a run and the stacks of their threads, when one stalls.

Actors `arm` themselves. On SIGUSR2 they then write the stacks of all their threads to their log,
however busy or blocked they are: `faulthandler` needs no lock and runs no Python code.
"""

from __future__ import annotations

import faulthandler
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from common.supervision import processes

_SIGNAL = signal.SIGUSR2
_STANDARD_ERROR = 2
_STATES = {"R": "running", "S": "waiting", "D": "waiting for a disk", "T": "stopped", "Z": "dead"}


@dataclass(frozen=True)
class Process:
    """A process below this one."""

    pid: int
    name: str
    state: str
    cpu_s: float


def arm() -> None:
    """Write the stacks of all threads to standard error whenever SIGUSR2 comes."""
    faulthandler.register(_SIGNAL, file=_STANDARD_ERROR, all_threads=True)


def stall_report() -> str:
    """One line for each process below this one. Armed processes are asked for their stacks."""
    lines = []
    for process in descendants(os.getpid()):
        asked = _is_armed(process.pid)
        if asked:
            os.kill(process.pid, _SIGNAL)
        written = "stacks in its log" if asked else ""
        lines.append(
            f"  {process.pid:>8} {process.name:<40} {process.state:<18} "
            f"{process.cpu_s:8.1f} s of CPU  {written}"
        )
    return "Processes of this run:\n" + "\n".join(lines)


def descendants(pid: int) -> Iterator[Process]:
    """Every process below `pid` on this machine, a parent before its children."""
    for child in processes.descendants(pid):
        try:
            yield _read(Path(f"/proc/{child}"))
        except (OSError, ValueError, IndexError):
            continue  # it has ended meanwhile


def _read(folder: Path) -> Process:
    """From /proc/PID; see proc(5) for the fields."""
    fields = processes.stat_of(folder.name)
    program, *words = (folder / "cmdline").read_text(errors="replace").split("\0")
    line = " ".join([Path(program).name, *words])
    name = " ".join(line.split())[:40] or "?"
    ticks = int(fields[11]) + int(fields[12])
    state = _STATES.get(fields[0], fields[0])
    return Process(int(folder.name), name, state, ticks / os.sysconf("SC_CLK_TCK"))


def _is_armed(pid: int) -> bool:
    """Whether the process catches the signal; to any other it would be deadly."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    (caught,) = [line.split()[1] for line in status.splitlines() if line.startswith("SigCgt")]
    return bool(int(caught, 16) >> (_SIGNAL - 1) & 1)
