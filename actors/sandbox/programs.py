"""Running a program a model wrote, from the judge's side.

    judge ── desk ──▶ sandbox's parent: starts a runner, hands over a socket to it
    judge ── socket ─▶ runner (`actors.sandbox.runner`): forks, confines, runs, answers `Ended`

The judge knows what a program should give; the runner and the program do not, and stand behind
walls of their own. When a runner dies while a program runs it was the program's doing
(`RunnerLostError`), and the next program gets a new one. Outside of a sandbox a process starts a
runner itself.
"""

from __future__ import annotations

import atexit
import json
import select
import socket
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache

from actors.sandbox.process import WalledProcess
from actors.sandbox.walls import Walls, find_walls, program_paths
from common.errors import UserError, VerifierError

MAX_HANDED = 8
MEMORY_LIMIT_BYTES = 4 * 2**30
_GRACE_S = 10.0
_DESK_S = 60.0
_MESSAGE_BYTES = 2**16


@dataclass(frozen=True)
class Request:
    """One program: a function of the runner's module, and its limit of time."""

    entry: str
    seconds: float


@dataclass(frozen=True)
class Ended:
    """How a program ended."""

    status: int | None
    """Exit status, negative for a signal; None where the runner ended it."""
    reason: str
    """Why the runner ended it."""
    touched: Mapping[str, int]
    """Refused system calls and opens, by what they were after (`actors.sandbox.calls`)."""
    failure: str
    """Why it was never confined and never ran; empty where it was."""

    @property
    def kinds(self) -> str:
        """What it touched, joined by commas; empty for most."""
        return ",".join(sorted(kind for kind, times in self.touched.items() if times))


class RunnerLostError(Exception):
    """The runner died or fell silent while a program ran."""


class Runner:
    """The process that runs programs, as its owner holds it."""

    def __init__(self, walls: Walls, module: str, memory_bytes: int = MEMORY_LIMIT_BYTES) -> None:
        self.judges_end, runners_end = socket.socketpair()
        with runners_end:
            self._process = WalledProcess(
                walls,
                "actors.sandbox.runner",
                str(runners_end.fileno()),
                str(memory_bytes),
                module,
                readable=program_paths(),
                kept=[runners_end.fileno()],
            )

    @property
    def folder(self) -> str:
        return self._process.folder

    def close(self) -> None:
        self.judges_end.close()
        self._process.kill()


class Programs:
    """Runs programs of one `module`, whose functions are their entry points."""

    def __init__(self, module: str, runner: socket.socket | None = None) -> None:
        """Keep the module's name.

        Args:
            runner: where a runner listens already; when that is lost, there is no other.
        """
        self._module = module
        self._socket = runner
        self._given = runner is not None
        self._own: Runner | None = None

    def start(self) -> socket.socket:
        """Have a runner; returns the socket it listens at.

        Raises: `UserError` where the walls here would not hold a program; `RunnerLostError` when
        the one that was given is lost.
        """
        if self._socket is None and self._given:
            raise RunnerLostError
        if self._socket is None:
            self._socket = self._from_desk() if _Desk.socket else self._from_here()
        return self._socket

    def run(self, entry: str, handed: Sequence[int], seconds: float) -> Ended:
        """Run one program and return when it has ended.

        Args:
            entry: a function of the module.
            handed: descriptors: its standard input, its standard output, and what `entry` takes.

        Raises:
            RunnerLostError: the program, or something it did, ended the runner.
            VerifierError: no runner can be had.
        """
        desk = self.start()
        message = json.dumps(asdict(Request(entry, seconds))).encode()
        try:
            socket.send_fds(desk, [message], handed)
        except OSError:  # it died between two programs: no program is to blame
            self._drop()
            socket.send_fds(self.start(), [message], handed)
        return self._answer(seconds)

    def _answer(self, seconds: float) -> Ended:
        assert self._socket is not None
        ready, _, _ = select.select([self._socket], [], [], seconds + _GRACE_S)
        data = self._socket.recv(_MESSAGE_BYTES) if ready else b""
        if not data:
            self._drop()
            raise RunnerLostError
        return Ended(**json.loads(data))

    def _drop(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        if self._own is not None:
            self._own.close()
            self._own = None

    def _from_here(self) -> socket.socket:
        walls = find_walls()
        check_walls(walls)
        self._own = Runner(walls, self._module)
        atexit.register(self._drop)
        return self._own.judges_end

    def _from_desk(self) -> socket.socket:
        desk = _Desk.socket
        assert desk is not None
        desk.sendall(self._module.encode())
        ready, _, _ = select.select([desk], [], [], _DESK_S)
        if not ready:
            raise VerifierError(f"no runner of programs within {_DESK_S:.0f} s")
        message, handed, _, _ = socket.recv_fds(desk, _MESSAGE_BYTES, 1)
        if not handed:
            raise UserError(message.decode() or "the sandbox has ended")
        return socket.socket(fileno=handed[0])


class _Desk:
    socket: socket.socket | None = None


def use_desk(descriptor: int) -> None:
    """Ask for runners at this socket from now on; the sandbox's child does."""
    _Desk.socket = socket.socket(fileno=descriptor)


@lru_cache
def programs(module: str) -> Programs:
    """This process's runner of programs whose entry points are in `module`."""
    return Programs(module)


def check_walls(walls: Walls) -> None:
    """Raise `UserError` where a program behind `walls` could reach its judge."""
    check_gaps(
        walls.gaps(), ", or set verifier.sandbox=trusted if a program may read and do what you can"
    )


def check_gaps(gaps: Sequence[str], otherwise: str = "") -> None:
    """Raise `UserError` where walls have `gaps`; it says to mend that, or `otherwise`."""
    if gaps:
        raise UserError(
            f"programs that a model writes are not safe to run here: {'; '.join(gaps)}. "
            f"Mend that{otherwise}"
        )
