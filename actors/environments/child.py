"""The worker process of `actors.environments.worker`: it forks a process for every episode.

Run as `python -P -m actors.environments.child ACCESS CONTROL`, CONTROL the descriptor of a socket
that keeps messages apart. The worker stands behind walls, imports the environment's module, says
that it is ready, and then does what it is told:

    {"open": KEY} and a socket   ->  {"began": KEY}, and later {"ended": KEY, "how": ...}
    {"kill": KEY}

A process an episode costs some milliseconds, and keeps episodes apart: one that hangs, crashes or
changes its interpreter harms no other. Python's random numbers and modules are its own. The worker
itself runs nothing of the user's but imports, so it always answers.

An episode's process lives in a folder of its own, with limits of memory, processor time, files and
processes. What it leaves behind is ended with it.
"""

from __future__ import annotations

import contextlib
import gc
import json
import math
import os
import resource
import select
import shutil
import signal
import socket
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

from actors.environments.player import play
from actors.environments.resolve import Factory, resolve
from actors.sandbox import kernel, runner
from actors.sandbox.confinement import close_network, limit_files, lower_limit
from actors.sandbox.inside import Access, enter
from actors.sandbox.process import end
from actors.sandbox.programs import check_gaps
from actors.sandbox.walls import program_paths
from common.errors import UserError
from common.supervision.processes import children, descendants, memory_of, running

MAX_PROCESSES = 32
"""How many processes an episode may have started at one time."""
MAX_CONTROL_BYTES = 2**16
_TICK_MS = 50
_WEIGH_S = 0.5


def main() -> None:
    """Become the worker; returns when the host has closed its end."""
    access = Access.from_json(sys.argv[1])
    control = socket.socket(fileno=int(sys.argv[2]))
    enter(access)
    settings = json.loads(control.recv(MAX_CONTROL_BYTES))
    lower_limit(resource.RLIMIT_CORE, 0)
    limit_files()
    kernel.adopt_orphans()
    try:
        if not settings["network"]:
            close_network("if you trust it, set environment.network=true")
        factory = resolve(settings["name"], settings["args"])
        check_gaps(settings["gaps"] if factory.programs else ())
    except UserError as error:
        control.send(json.dumps({"failure": str(error)[: MAX_CONTROL_BYTES // 8]}).encode())
        return
    gc.collect()
    gc.freeze()  # what is here is copied on no episode's collection
    control.send(json.dumps({"ready": os.getpid()}).encode())
    _Worker(control, settings, factory, access).serve()


@dataclass(frozen=True)
class _Process:
    key: str
    pid: int
    folder: str

    def kill(self) -> None:
        """End it with its group, at a stroke: what it forks goes on forking while one looks."""
        end(self.pid, os.killpg)
        end(self.pid)  # where it has not made its group yet


class _Worker:
    def __init__(
        self, control: socket.socket, settings: dict[str, Any], factory: Factory, access: Access
    ) -> None:
        self._control = control
        self._settings = settings
        self._factory = factory
        self._access = access
        # Imported here, so that a runner of programs is there as soon as it is forked.
        self._programs = import_module(factory.programs) if factory.programs else None
        # Not what the environment may read: the data set with its answers is among that.
        self._of_programs = replace(access, readable=program_paths(), writable=())
        self._spared = set(children(os.getpid()))  # the guardian, where it is below us
        self._by_pidfd: dict[int, _Process] = {}
        self._reasons: dict[int, str] = {}
        self._begun = 0
        self._few = 0
        self._weighed_s = 0.0
        self._poll = select.poll()
        self._poll.register(control, select.POLLIN)

    def serve(self) -> None:
        while True:
            for descriptor, _ in self._poll.poll(_TICK_MS if self._by_pidfd else None):
                if descriptor != self._control.fileno():
                    self._bury(descriptor)
                elif not self._obey():
                    return self._end_all()
            self._count_processes()
            self._weigh()

    def _obey(self) -> bool:
        """Do what the host says; False once it says nothing more."""
        data, handed, _, _ = socket.recv_fds(self._control, MAX_CONTROL_BYTES, 1)
        if not data:
            return False
        message = json.loads(data)
        if "open" in message:
            self._open(message["open"], socket.socket(fileno=handed[0]))
        else:
            for process in self._by_pidfd.values():
                if process.key == message["kill"]:
                    process.kill()
        return True

    def _open(self, key: str, channel: socket.socket) -> None:
        self._begun += 1
        folder = os.path.join(self._access.writable[0], f"episode-{self._begun}")
        os.mkdir(folder)
        pid = os.fork()
        if pid == 0:
            self._become(channel, folder)
        channel.close()
        pidfd = os.pidfd_open(pid)
        self._by_pidfd[pidfd] = _Process(key, pid, folder)
        self._poll.register(pidfd, select.POLLIN)
        self._say({"began": key})

    def _become(self, channel: socket.socket, folder: str) -> None:
        """Be the process of one episode, to its end."""
        try:
            os.setpgid(0, 0)
            kernel.die_with_parent()
            kernel.adopt_orphans()
            self._control.close()
            for pidfd in self._by_pidfd:
                os.close(pidfd)
            null = os.open(os.devnull, os.O_RDWR)
            for descriptor in (0, 1, 2):
                os.dup2(null, descriptor)
            os.close(null)
            os.chdir(folder)
            os.environ["TMPDIR"], tempfile.tempdir = folder, None
            lower_limit(resource.RLIMIT_AS, self._settings["memory_bytes"])
            lower_limit(resource.RLIMIT_CPU, math.ceil(self._settings["cpu_s"]))
            limit = self._settings["observation_characters"]
            play(channel, self._factory, limit, self._runner(channel))
        finally:
            os._exit(0)

    def _runner(self, channel: socket.socket) -> socket.socket | None:
        """A process that runs programs. It comes before the episode's first message: what is in
        its memory, and in that of every program, holds no task."""
        if self._programs is None:
            return None
        memory_bytes = self._settings["memory_bytes"]
        ours, theirs = socket.socketpair()
        if os.fork() == 0:
            ours.close()
            channel.close()
            try:
                runner.serve(theirs, self._programs, self._of_programs, memory_bytes)
            finally:
                os._exit(0)
        theirs.close()
        return ours

    def _bury(self, pidfd: int) -> None:
        """An episode's process has ended: end what it has left, and say so."""
        self._poll.unregister(pidfd)
        os.close(pidfd)
        process = self._by_pidfd.pop(pidfd)
        process.kill()  # what is left of its group
        code = os.waitstatus_to_exitcode(os.waitpid(process.pid, 0)[1])
        how = f"exit status {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"
        self._end_strays()
        shutil.rmtree(process.folder, ignore_errors=True)
        self._say({"ended": process.key, "how": self._reasons.pop(process.pid, how)})

    def _end_strays(self) -> None:
        """Kill what an episode has left. It is our child by then, and no episode's process: an
        orphan goes to its episode, and to us when that has ended."""
        kept = {*self._spared, *(process.pid for process in self._by_pidfd.values())}
        while strays := [pid for pid in children(os.getpid()) if pid not in kept]:
            for pid in strays:
                end(pid)
            for pid in strays:
                os.waitpid(pid, 0)

    def _count_processes(self) -> None:
        """End the episodes that have started too many processes.

        It costs a walk through /proc, so it is done when the machine has become fuller.
        """
        if (now := running()) is not None:
            self._few = min(self._few or now, now)
            if now <= self._few + MAX_PROCESSES:
                return
            self._few = now
        for process in self._by_pidfd.values():
            if len(descendants(process.pid, MAX_PROCESSES + 1)) > MAX_PROCESSES:
                self._reasons[process.pid] = f"it had more than {MAX_PROCESSES} processes"
                process.kill()

    def _weigh(self) -> None:
        """End the episodes whose processes hold too much memory together. The kernel bounds that
        of each."""
        if time.monotonic() < self._weighed_s + _WEIGH_S:
            return
        limit = self._settings["memory_bytes"]
        for process in self._by_pidfd.values():
            below = descendants(process.pid, MAX_PROCESSES + 1)
            if below and memory_of([process.pid, *below]) > limit:
                self._reasons[process.pid] = (
                    f"it had more than {limit / 2**30:g} GiB of memory (environment.memory_gib)"
                )
                process.kill()
        self._weighed_s = time.monotonic()

    def _say(self, message: dict[str, str]) -> None:
        with contextlib.suppress(OSError):  # the host is gone: the next read says so
            self._control.send(json.dumps(message).encode())

    def _end_all(self) -> None:
        for process in self._by_pidfd.values():
            process.kill()
        self._by_pidfd.clear()
        self._end_strays()


if __name__ == "__main__":
    main()
