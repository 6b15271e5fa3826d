"""Keeps one command of somebody else's: starts it behind walls, and ends all that it started.

Run as `python -P -m actors.endpoint.keeper ACCESS CONTROL IN OUT ERR`, the last four descriptors:
a socket that keeps messages apart, and the command's standard streams. The keeper is told its
settings, opens an address for the endpoint, and hands the listener out:

    {"settings"}  ->  {"listening": PORT} and the listener, or {"failure": WHY}
                      {"ended": HOW} when the command has ended, with all that it started
    {"end": true}     ends it

Then the keeper stays until its host ends it: what the command left behind becomes the keeper's own
child, and none is lost.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import resource
import select
import signal
import socket
import sys
from typing import Any, NoReturn

from actors.sandbox import kernel, landlock
from actors.sandbox.confinement import limit_files, lower_limit, only_internet
from actors.sandbox.inside import Access, enter
from actors.sandbox.network import leave_network
from actors.sandbox.process import end_below
from common.errors import UserError
from common.supervision.processes import children, descendants, memory_of, running

MAX_PROCESSES = 64
"""How many processes and threads' leaders a command may have at one time."""
MAX_MESSAGE_BYTES = 2**16
_TICK_MS, _MEMORY_TICKS = 200, 5


def main() -> None:
    """Keep one command; returns when the host has closed its end."""
    access = Access.from_json(sys.argv[1])
    control = socket.socket(fileno=int(sys.argv[2]))
    streams = [int(stream) for stream in sys.argv[3:6]]
    settings: dict[str, Any] = json.loads(control.recv(MAX_MESSAGE_BYTES))
    try:
        if settings["leave_network"]:
            leave_network()
        listener = socket.create_server(("127.0.0.1", 0))
        enter(access)
        lower_limit(resource.RLIMIT_CORE, 0)
        limit_files()
        kernel.adopt_orphans()
        if settings["confined"]:
            only_internet()
    except (OSError, UserError) as error:
        _say(control, {"failure": str(error)})
        return
    port = listener.getsockname()[1]
    socket.send_fds(control, [json.dumps({"listening": port}).encode()], [listener.fileno()])
    listener.close()
    if settings["command"]:
        spared = set(children(os.getpid()))  # the guardian, where it is below us
        pid = os.fork()
        if pid == 0:
            control.close()
            _become(access, settings, port, streams)
        for stream in streams:
            os.close(stream)
        how = _wait(control, pid, settings["memory_bytes"])
        end_below(children, spared)
        _say(control, {"ended": how})
    control.recv(1)  # until the host ends us


def _become(access: Access, settings: dict[str, Any], port: int, streams: list[int]) -> NoReturn:
    """Be the command."""
    try:
        os.setpgid(0, 0)
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
        lower_limit(resource.RLIMIT_CPU, math.ceil(settings["cpu_s"]))
        if access.landlock:  # once more: it must not reach its keeper, which is outside of this one
            landlock.restrict(access.readable, access.writable)
        folder = access.writable[0]
        own = {
            "HOME": folder,
            "TMPDIR": folder,
            "OPENAI_BASE_URL": f"http://127.0.0.1:{port}/v1",
            "OPENAI_API_KEY": settings["key"],
        }
        command = settings["command"]
        os.execve(command[0], command, settings["variables"] | own)
    except OSError as error:
        os.write(2, f"{settings['command'][0]} cannot be run: {error.strerror}\n".encode())
    finally:
        os._exit(127)


def _wait(control: socket.socket, pid: int, memory_bytes: int) -> str:
    """Wait for the command to end, for the host to want that, or for it to hold too much."""
    pidfd = os.pidfd_open(pid)
    poll = select.poll()
    poll.register(control, select.POLLIN)
    poll.register(pidfd, select.POLLIN)
    few, ticks = running() or 0, 0
    while True:
        ready = [descriptor for descriptor, _ in poll.poll(_TICK_MS)]
        if pidfd in ready:
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            return f"exit status {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"
        if ready:
            return "its host ended it"
        ticks += 1
        now = running() or 0
        if now > few + MAX_PROCESSES:  # a walk through /proc costs more than this number
            few = now
            if len(descendants(os.getpid(), MAX_PROCESSES + 2)) > MAX_PROCESSES + 1:
                return f"it had more than {MAX_PROCESSES} processes"
        few = min(few, now)
        if ticks % _MEMORY_TICKS == 0:
            below = descendants(os.getpid(), MAX_PROCESSES)
            if below and memory_of(below) > memory_bytes:
                return f"it had more than {memory_bytes / 2**30:g} GiB of memory"


def _say(control: socket.socket, message: dict[str, str]) -> None:
    with contextlib.suppress(OSError):  # the host is gone: the guardian ends us
        control.send(json.dumps(message).encode())


if __name__ == "__main__":
    main()
