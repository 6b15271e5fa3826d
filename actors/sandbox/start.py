"""Starts a command, with a guardian beside it that ends both when their parent is gone.

Run as `python -P -m actors.sandbox.start LIFELINE FOLDER COMMAND...`. LIFELINE is the descriptor of
a pipe whose other end the parent holds open. The guardian stays outside of all walls: it outlives
what it ends. (PR_SET_PDEATHSIG would fire when the *thread* that started the command ends.)
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys

from common.supervision.processes import descendants


def main() -> None:
    lifeline, folder, command = int(sys.argv[1]), sys.argv[2], sys.argv[3:]
    if os.fork() == 0:
        _guard(lifeline, folder)
    os.close(lifeline)
    os.execvp(command[0], command)


def _guard(lifeline: int, folder: str) -> None:
    """Wait for the parent's end of `lifeline` to close; kill the group, remove the folder."""
    for descriptor in os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else ():
        if int(descriptor) not in (2, lifeline):
            try:
                os.close(int(descriptor))
            except OSError:  # the listing's own
                continue
    os.read(lifeline, 1)
    group = os.getpgrp()
    left_it = [pid for pid in descendants(group) if pid != os.getpid()]
    os.setsid()
    with contextlib.suppress(ProcessLookupError):  # the command had ended by itself
        os.killpg(group, signal.SIGKILL)
    for pid in left_it:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)
    shutil.rmtree(folder, ignore_errors=True)  # gone if the parent had time for it
    os._exit(0)


if __name__ == "__main__":
    main()
