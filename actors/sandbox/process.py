"""One process behind walls: how it is started, and how it ends with everything it started.

The process leads a session of its own, and the parent kills that whole group, and on Linux what has
left it. A *guardian* (`actors.sandbox.start`) does so when the parent is gone, however it went.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import IO

from actors.sandbox.inside import Access
from actors.sandbox.walls import Walls, command, environment, free_user
from common.supervision.processes import descendants, memory_of

_EXIT_TIMEOUT_S = 10.0


def end(pid: int, send: Callable[[int, int], None] = os.kill) -> None:
    """Kill a process that may be gone already."""
    with contextlib.suppress(ProcessLookupError):
        send(pid, signal.SIGKILL)


def end_below(below: Callable[[int], list[int]], spared: set[int]) -> None:
    """Kill what runs below us, wherever it moved.

    Orphans become our children where we adopt them, so none is left when there is none.

    Args:
        below: looks for processes below one: `children`, or `descendants`, which ends more in a
            round and walks further.
    """
    while left := [pid for pid in below(os.getpid()) if pid not in spared]:
        for pid in left:
            end(pid)
        for pid in left:
            # A grandchild cannot be waited for yet: it becomes ours in the next round.
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)


class WalledProcess:
    """`python -m module ACCESS arguments...`, behind walls, in an empty folder of its own.

    Args:
        readable: paths it may read; its folder is the one it may write.
        inherited: names of variables that it is given beside the usual ones.
        kept: descriptors that it inherits beside standard input and output.
    """

    def __init__(
        self,
        walls: Walls,
        module: str,
        *arguments: str,
        readable: Sequence[str],
        inherited: Sequence[str] = (),
        kept: Sequence[int] = (),
        piped: bool = False,
        network: bool = False,
    ) -> None:
        self._walls = walls
        self._folder = tempfile.TemporaryDirectory(prefix="grpo-lambda-verifier-")
        # What is closed to others would be closed to a user of its own: a project in root's home.
        user = free_user() if walls.own_user and walls.open_to_others(readable) else None
        if user is not None:
            os.chown(self._folder.name, user, user)
        access = Access(readable, [self._folder.name], walls.landlock > 0, user)
        guardian_end, parent_end = os.pipe()
        starter = [sys.executable, "-P", "-m", "actors.sandbox.start"]
        pipe = subprocess.PIPE if piped else subprocess.DEVNULL
        self._process = subprocess.Popen(
            [
                *starter,
                str(guardian_end),
                self._folder.name,
                *command(walls, access, module, *arguments, network=network),
            ],
            stdin=pipe,
            stdout=pipe,
            pass_fds=(guardian_end, *kept),
            start_new_session=True,
            env=environment(inherited, self._folder.name),
            cwd=self._folder.name,
            bufsize=0,
        )
        os.close(guardian_end)
        # A file object, so that the pipe closes with its owner when nobody calls end().
        self._lifeline: IO[bytes] = os.fdopen(parent_end, "wb", buffering=0)
        self._below = 0
        self.stdin, self.stdout = self._process.stdin, self._process.stdout

    @property
    def pid(self) -> int:
        """The process's id, which is also its group's."""
        return self._process.pid

    @property
    def folder(self) -> str:
        return self._folder.name

    def ended(self) -> bool:
        return self._process.poll() is not None

    def excess(self, processes: int, memory_bytes: int) -> str:
        """What it and all it has started hold too much of, in words; empty while they do not.

        One process alone is bound by the kernel, so memory is added up where there are more. That
        takes a millisecond for each, so it waits until they have stopped to multiply.
        """
        own = 1 + self._walls.processes_between  # the guardian, and the walls'
        below = descendants(self.pid, processes + 1 + own)
        if len(below) - own > processes:
            return f"more than {processes} processes"
        grew, self._below = len(below) != self._below, len(below)
        if len(below) > own and not grew and memory_of([self.pid, *below]) > memory_bytes:
            return f"more than {memory_bytes / 2**30:g} GiB of memory"
        return ""

    def death(self, patience_s: float) -> str:
        """How it ended, in words."""
        try:
            code = self._process.wait(timeout=patience_s)
        except subprocess.TimeoutExpired:
            return "it closed its pipe"
        if self._walls.bubblewrap and code > 128:
            code = 128 - code  # bubblewrap says a signal as shells do
        return f"exit status {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"

    def kill(self) -> None:
        """End it, and everything it started; remove its folder."""
        # The id of a child that has been waited for may already be another process's.
        escaped = descendants(self.pid) if not self.ended() else []
        end(self.pid, os.killpg)
        for pid in escaped:
            end(pid)
        self._process.wait(timeout=_EXIT_TIMEOUT_S)
        for pipe in (self.stdin, self.stdout, self._lifeline):
            if pipe is not None:
                pipe.close()
        self._folder.cleanup()
