"""The process that runs programs a model wrote, one at a time, each in a process of its own.

Run as `python -P -m actors.sandbox.runner ACCESS SOCKET MEMORY MODULE`. It stands behind walls of
its own, apart from the judge, and holds no secret: what a program is to be told comes in
descriptors, which it hands on unread. A request on SOCKET is a JSON object and the descriptors of
standard input, standard output and whatever the entry point takes; the answer is an `Ended`.

A program is forked from here, so that it need not wait for an interpreter to start, and confined
before its first line (`_confine`). It leaves with its own death: nobody else's process is in reach.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import io
import json
import os
import resource
import select
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Literal, Self

from actors.sandbox import kernel, landlock
from actors.sandbox.calls import FILES
from actors.sandbox.confinement import compute_only, limit_files, lower_limit
from actors.sandbox.inside import Access, enter
from actors.sandbox.programs import MAX_HANDED, Ended, Request
from actors.sandbox.watch import refuse_one

MAX_OUTPUT_BYTES = 16 * 2**20
MAX_OPEN_FILES = 64
MAX_THREADS = 64
MAX_STACK_BYTES = 112 * 2**20
"""Linux keeps 128 MiB free below a stack."""
_POLL_MS = 50
_LISTENER, _CONFINED, _FAILED = b"=", b"+", b"-"
"""What a program's process tells the runner before the program's first line."""
_PRELOADED = (
    *("bisect", "collections", "copy", "datetime", "decimal", "fractions", "functools", "heapq"),
    *("itertools", "math", "operator", "random", "re", "statistics", "string", "threading"),
)

Entry = Callable[[Sequence[int]], None]


def main() -> None:
    """Serve until the judge's end of the socket closes, or, in a program's process, run it."""
    access = Access.from_json(sys.argv[1])
    desk = socket.socket(fileno=int(sys.argv[2]))
    memory_bytes, module = int(sys.argv[3]), sys.argv[4]
    enter(access)
    limit_files()
    for name in (*_PRELOADED, module):
        importlib.import_module(name)
    gc.freeze()  # what is here is copied on no program's collection
    serve(desk, importlib.import_module(module), access, memory_bytes)


def serve(desk: socket.socket, module: object, access: Access, memory_bytes: int) -> None:
    """Run the programs that are asked for at `desk`, until its other end closes.

    It returns in the processes of programs too, once they have run. The caller stands behind walls
    already, and knows nothing that a program may not know.

    Args:
        module: its functions are the entry points.
    """
    program = _serve(desk, module, access, memory_bytes)
    if program is not None:
        program()


def _serve(
    desk: socket.socket, module: object, access: Access, memory_bytes: int
) -> Callable[[], None] | None:
    """Answer requests; returns in the process of a program, with what it has to run."""
    while True:
        data, handed, _, _ = socket.recv_fds(desk, 2**16, MAX_HANDED)
        if not data:
            return None
        request = Request(**json.loads(data))
        entry: Entry = getattr(module, request.entry)
        ours, theirs = socket.socketpair()
        begun = time.monotonic()
        pid = os.fork()
        if pid == 0:
            desk.close()
            ours.close()
            return lambda: _become(entry, handed, theirs, access, memory_bytes)
        theirs.close()
        for descriptor in handed:
            os.close(descriptor)
        with ours:
            ended = _attend(pid, ours, begun + request.seconds)
        desk.sendall(json.dumps(asdict(ended)).encode())


class _Watch:
    """What the runner hears of a program: that it is confined, what it opens, what is refused."""

    def __init__(self, told: socket.socket) -> None:
        self.touched: Counter[str] = Counter()
        self.failure = "it ended before it was confined"
        self._told = told
        self._listener: int | None = None
        self._poll = select.poll()
        self._poll.register(told, select.POLLIN)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._listener is not None:
            os.close(self._listener)

    def add(self, process: int) -> None:
        self._poll.register(process, select.POLLIN)

    def listen(self) -> list[int]:
        """Hear what there is within some milliseconds; returns the descriptors that are others'."""
        others = []
        for descriptor, event in self._poll.poll(_POLL_MS):
            if descriptor == self._told.fileno():
                self._hear()
            elif descriptor != self._listener:
                others.append(descriptor)
            elif event & select.POLLIN:
                refuse_one(descriptor, self.touched)
            else:
                self._poll.unregister(descriptor)
        return others

    def _hear(self) -> None:
        if not self.failure:
            # Descriptors that a program sends along are not taken: they would pile up here.
            message = self._told.recv(2**12)
            self.touched[FILES] += len(message)
            if not message:
                self._poll.unregister(self._told)
            return
        # A byte, and not what a program may have sent behind it, descriptors and all.
        said, handed, _, _ = socket.recv_fds(self._told, 1, 1)
        if said == _LISTENER:
            (self._listener,) = handed
            self._poll.register(self._listener, select.POLLIN)
        elif said == _CONFINED:
            self.failure = ""
        elif said == _FAILED:
            self.failure = self._told.recv(2**12).decode()
        else:
            self._poll.unregister(self._told)


def _attend(pid: int, told: socket.socket, deadline: float) -> Ended:
    """Wait for a program's end, or bring it about; count what it touched meanwhile."""
    process = os.pidfd_open(pid)
    try:
        with _Watch(told) as watch:
            watch.add(process)
            while process not in watch.listen():
                if reason := _too_much(pid, deadline):
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)
                    return Ended(None, reason, dict(watch.touched), "")
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            watch.listen()  # what it said last
            failure = watch.failure and f"{watch.failure} (status {status})"
            return Ended(status, "", dict(watch.touched), failure)
    finally:
        os.close(process)


def _too_much(pid: int, deadline: float) -> str:
    if time.monotonic() > deadline:
        return "time limit"
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            threads = int(file.read().rpartition(b")")[2].split()[17])
    except OSError:
        return ""
    return f"more than {MAX_THREADS} threads" if threads > MAX_THREADS else ""


def _become(
    entry: Entry,
    handed: Sequence[int],
    told: socket.socket,
    access: Access,
    memory_bytes: int,
) -> None:
    """Be the process of one program: confine it, say so, run it."""
    try:
        _take_places(handed)
        limits = {
            resource.RLIMIT_CORE: 0,
            resource.RLIMIT_FSIZE: MAX_OUTPUT_BYTES,
            resource.RLIMIT_AS: memory_bytes,
        }
        if access.user is not None:  # whose are the runner's two, and these; elsewhere we count
            limits[resource.RLIMIT_NPROC] = MAX_THREADS + 2
        for what, limit in limits.items():
            lower_limit(what, limit)
        _deepen_stack()
        open_to_all = [*(path for path in access.readable if path != "/proc"), *access.writable]
        if access.landlock:
            landlock.restrict(open_to_all, ())
        _count_opens(told.fileno(), (*open_to_all, "/dev/"))
        listener = compute_only(watched=True)
        if listener is not None:
            socket.send_fds(told, [_LISTENER], [listener])
            os.close(listener)
        # Behind the send: this limit also bounds what all processes of a user have under way, and
        # another program may have filled that.
        lower_limit(resource.RLIMIT_NOFILE, MAX_OPEN_FILES)
        told.send(_CONFINED)
    except Exception as error:  # whatever it is, it is told: the program has not run
        told.send(_FAILED + f"{type(error).__name__}: {error}".encode()[:500])
        os._exit(1)
    entry(handed[2:])


def _take_places(handed: Sequence[int]) -> None:
    """Standard input and output as the request says, errors nowhere, fresh files on top."""
    kernel.die_with_parent()
    null = os.open(os.devnull, os.O_WRONLY)
    for source, place in ((handed[0], 0), (handed[1], 1), (null, 2)):
        os.dup2(source, place)
    for descriptor in (handed[0], handed[1], null):
        os.close(descriptor)
    sys.argv = ["program.py"]
    sys.stdin = sys.__stdin__ = _text(0, "rb")  # type: ignore[misc]
    sys.stdout = sys.__stdout__ = _text(1, "wb")  # type: ignore[misc]
    sys.stderr = sys.__stderr__ = _text(2, "wb")  # type: ignore[misc]


def _text(descriptor: int, mode: Literal["rb", "wb"]) -> io.TextIOWrapper:
    raw = io.FileIO(descriptor, mode, closefd=False)
    buffered = io.BufferedReader(raw) if mode == "rb" else io.BufferedWriter(raw)
    return io.TextIOWrapper(buffered, encoding="utf-8", errors="surrogateescape")


def _deepen_stack() -> None:
    """Let recursion through C (a cached function that calls itself) go as deep as the recursion
    limit of the suites' graders, 50,000; Linux reads the limit whenever the stack grows."""
    hard = resource.getrlimit(resource.RLIMIT_STACK)[1]
    wanted = MAX_STACK_BYTES if hard == resource.RLIM_INFINITY else min(MAX_STACK_BYTES, hard)
    resource.setrlimit(resource.RLIMIT_STACK, (wanted, hard))


def _count_opens(told: int, allowed: Sequence[str]) -> None:
    """Tell the runner of files that are opened outside of `allowed`.

    A program that knows of it can write here too, or go around it: it can only blacken itself, or
    hide from a count. What it may open is the walls' business.
    """
    prefixes = tuple(allowed)

    def noticed(event: str, arguments: tuple[object, ...]) -> None:
        if event == "open" and isinstance(arguments[0], (str, bytes)):
            path = os.path.abspath(os.fsdecode(arguments[0]))
            if not path.startswith(prefixes):
                with contextlib.suppress(OSError):
                    os.write(told, b"f")

    sys.addaudithook(noticed)


if __name__ == "__main__":
    main()
