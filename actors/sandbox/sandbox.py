"""Verdicts in a child process that can be killed.

`Sandbox` keeps one child alive behind walls (`actors.sandbox.child`, `actors.sandbox.process`) and
hands it the tasks of a group. One message is four bytes of length and a JSON value. The child says
when it begins and answers task by task, so the parent always knows which task it is on, or that it
is on none:

    parent: rules -> child: ready | failure
    parent: tasks -> child: begun, verdict, verdict, ...     each within `timeout_s`, or SIGKILL

Before a verdict the child may say that from here on the completion is to blame: what ends the child
then is a wrong answer, and before it an error of the task (`actors.sandbox.blame`).

A rule that runs programs asks for a runner of them at the *desk*, a socket beside the pipes; the
parent starts it behind walls of its own (`actors.sandbox.programs`). Rules run on the child's main
thread, where SIGALRM works, with the environment of `walls.environment` and no more, in an empty
folder; their standard output is discarded.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import IO, Any

from actors.sandbox.child import BLAMED, LENGTH, frame
from actors.sandbox.process import WalledProcess
from actors.sandbox.programs import MEMORY_LIMIT_BYTES, Runner, check_walls
from actors.sandbox.verdict import Verdict
from actors.sandbox.walls import Walls, find_walls, rule_paths
from common.errors import RunError, UserError, VerifierError
from common.record.schema import ERROR, TIMEOUT

MAX_PROCESSES = 32
"""How many processes a rule may hold at one time. The kernel's own limit is no help here. It counts
those of a whole user, and none of root's."""
START_TIMEOUT_S = 120.0
_HAND_OVER_TIMEOUT_S = 30.0
_HAND_OVERS = 3
_POLL_MS = 50
_MAX_MESSAGE_BYTES = 2**20
_MAX_MODULE_BYTES = 1000


@dataclass(frozen=True)
class RuleSpec:
    """A rule before it is resolved: column name, built-in or import path, arguments."""

    name: str
    target: str
    args: dict[str, Any]


@dataclass(frozen=True)
class Task:
    """One rule (an index into the rules) on one completion; `reference` is JSON."""

    rule: int
    text: str
    reference: str
    finish_reason: str = ""
    """Why sampling ended: `stop` or `length`; empty where nobody knows."""
    prompt: str = ""
    """What the policy read before the completion, template included."""


class _ChildDiedError(Exception):
    """The child ended, or spoke out of turn, where a message was due."""


class Sandbox:
    """One child process. `score` and `wait_ready` belong to one thread, `close` to any.

    The constructor starts the child and returns; the first `wait_ready` waits for its imports.
    """

    _process: WalledProcess
    _desk: socket.socket
    _completion_to_blame: bool
    _ready: bool
    _ready_deadline: float

    def __init__(
        self,
        judge: str,
        rules: Sequence[RuleSpec],
        timeout_s: float,
        memory_bytes: int = MEMORY_LIMIT_BYTES,
        start_timeout_s: float = START_TIMEOUT_S,
        network: bool = False,
        walls: Walls | None = None,
        trusted: bool = False,
        readable: Sequence[str] = (),
    ) -> None:
        """Start the child.

        Args:
            judge: `module:function` that makes rules of their descriptions, in the child.
            walls: None: the best that hold here.
            trusted: programs run also where they could reach their judge.
            readable: paths that rules may read beside Python and what can be imported.
        """
        self._rules = tuple(rules)
        self._hello = {
            "judge": judge,
            "rules": [asdict(rule) for rule in rules],
            "timeout_s": timeout_s,
            "memory_bytes": memory_bytes,
            "network": network,
        }
        self._timeout_s = timeout_s
        self._memory_bytes, self._network = memory_bytes, network
        self._start_timeout_s = start_timeout_s
        self._walls = find_walls() if walls is None else walls
        self._trusted = trusted
        self._readable = rule_paths(readable)
        self._lock = threading.Lock()
        self._closed = False
        self._runner: Runner | None = None
        self._start()

    @property
    def pid(self) -> int:
        """The child's process id, which is also its group's."""
        return self._process.pid

    @property
    def folders(self) -> list[str]:
        """The folders of the processes behind the walls."""
        runner = [] if self._runner is None else [self._runner.folder]
        return [self._process.folder, *runner]

    def wait_ready(self) -> None:
        """Return when the child can judge.

        Raises: `UserError` when a rule cannot be resolved; `VerifierError` when the child dies
        or is not ready within the start deadline.
        """
        if self._ready:
            return
        try:
            self._send(self._hello, self._ready_deadline)
            answer = self._receive(self._ready_deadline)
        except TimeoutError as error:
            raise VerifierError(
                f"the verifier process was not ready within {self._start_timeout_s:.0f} s: "
                "a rule's module takes too long to import; let it load less, or later"
            ) from error
        except _ChildDiedError as error:
            raise VerifierError(
                f"the verifier process ended at its start: {error}; see what it printed in log/ of "
                "the run directory"
            ) from error
        if answer.get("failure"):
            raise UserError(answer["failure"])
        self._ready = True

    def score(self, tasks: Sequence[Task]) -> list[Verdict]:
        """One verdict a task, in order. A task that takes too long or ends the child is given
        `timeout` or `error`, the child is started anew, and the tasks after it are judged.

        Raises: as `wait_ready`; `RunError` when the sandbox is closed.
        """
        verdicts: list[Verdict] = []
        while len(verdicts) < len(tasks):
            self._hand_over(tasks[len(verdicts) :])
            try:
                self._collect(verdicts, len(tasks))
            except TimeoutError:
                reason = f"no verdict within {self._timeout_s:g} s"
                verdicts.append(self._blamed(TIMEOUT, tasks[len(verdicts)], reason))
                self._restart()
            except _ChildDiedError as death:
                reason = f"ended its process: {death}"
                verdicts.append(self._blamed(ERROR, tasks[len(verdicts)], reason))
                self._restart()
        return verdicts

    def close(self) -> None:
        """End the child and everything it started. Safe to call twice, from any thread."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._kill()

    def _blamed(self, kind: str, task: Task, reason: str) -> Verdict:
        """A verdict of `kind`; a wrong answer where the rule had blamed the completion."""
        reason = f"{self._rules[task.rule].name}: {reason}"
        if self._completion_to_blame:
            return Verdict.scored(0.0, reason)
        return Verdict(kind, None, reason)

    def _hand_over(self, tasks: Sequence[Task]) -> None:
        """Return when the child has begun `tasks`. One that is found dead, or dies before it has
        begun, is replaced: no completion is to blame."""
        for _ in range(_HAND_OVERS):
            self.wait_ready()
            deadline = time.monotonic() + _HAND_OVER_TIMEOUT_S
            try:
                self._send([asdict(task) for task in tasks], deadline)
                self._receive(deadline)
                return
            except (TimeoutError, _ChildDiedError) as error:
                cause = error
                self._restart()
        raise VerifierError(
            f"the verifier process failed {_HAND_OVERS} times before it judged anything: {cause}; "
            "see what it printed in log/ of the run directory"
        )

    def _collect(self, verdicts: list[Verdict], total: int) -> None:
        while len(verdicts) < total:
            self._completion_to_blame = False
            deadline = time.monotonic() + self._timeout_s
            while (answer := self._receive(deadline)) == BLAMED:
                self._completion_to_blame = True
            try:
                verdicts.append(Verdict(**answer))
            except (TypeError, ValueError) as error:
                raise _ChildDiedError(f"it sent {answer!r:.80}, which is no verdict") from error

    def _start(self) -> None:
        with self._lock:
            if self._closed:
                raise RunError("the verifier sandbox is closed")
            self._desk, childs_end = socket.socketpair()
            with childs_end:
                self._process = WalledProcess(
                    self._walls,
                    "actors.sandbox.child",
                    str(childs_end.fileno()),
                    readable=self._readable,
                    inherited=("HOME",),
                    kept=[childs_end.fileno()],
                    piped=True,
                    network=self._network,
                )
            assert self._process.stdin is not None
            assert self._process.stdout is not None
            self._requests, self._answers = self._process.stdin, self._process.stdout
            os.set_blocking(self._requests.fileno(), False)
            self._completion_to_blame = False
            self._ready = False
            self._ready_deadline = time.monotonic() + self._start_timeout_s

    def _restart(self) -> None:
        with self._lock:
            if not self._closed:
                self._kill()
        self._start()

    def _kill(self) -> None:
        self._process.kill()
        self._desk.close()
        if self._runner is not None:
            self._runner.close()
            self._runner = None

    def _at_desk(self) -> bool:
        """The child asks for a runner of programs: a new one, whatever became of the last.

        False once nobody can ask any more.
        """
        with contextlib.suppress(OSError):
            asked = self._desk.recv(_MAX_MODULE_BYTES)
            if not asked:
                return False
            module = asked.decode("ascii", "replace")
            if not all(part.isidentifier() for part in module.split(".")):
                return True  # a rule that writes to every descriptor
            with self._lock:
                if self._runner is not None:
                    self._runner.close()
                    self._runner = None
                try:
                    if not self._trusted:
                        check_walls(self._walls)
                except UserError as error:
                    self._desk.sendall(str(error).encode())
                    return True
                if not self._closed:
                    self._runner = Runner(self._walls, module, self._memory_bytes)
                    socket.send_fds(self._desk, [b"+"], [self._runner.judges_end.fileno()])
                    return True
        return False

    def _death(self) -> _ChildDiedError:
        return _ChildDiedError(self._process.death(_POLL_MS / 1000))

    def _await(self, pipe: IO[bytes], event: int, deadline: float) -> None:
        """Return when `pipe` is ready. Death is looked for too: a process that a rule left behind
        may hold the other end of the pipe open. So are too many processes."""
        poll = select.poll()
        poll.register(pipe, event)
        desk = self._desk.fileno()
        if desk >= 0:
            poll.register(desk, select.POLLIN)
        while True:
            found = [descriptor for descriptor, _ in poll.poll(_POLL_MS)]
            if desk in found and not self._at_desk():
                poll.unregister(desk)
            if any(descriptor != desk for descriptor in found):
                return
            if self._process.ended():
                raise self._death()
            if much := self._process.excess(MAX_PROCESSES, self._memory_bytes):
                raise _ChildDiedError(f"it was ended, with {much}")
            if time.monotonic() > deadline:
                raise TimeoutError

    def _send(self, message: Any, deadline: float) -> None:
        left = memoryview(frame(message))
        while left:
            try:
                self._await(self._requests, select.POLLOUT, deadline)
                left = left[self._requests.write(left) or 0 :]
            except (BrokenPipeError, ValueError) as error:  # ValueError: closed by close()
                raise self._death() from error

    def _receive(self, deadline: float) -> Any:
        (size,) = LENGTH.unpack(self._read(LENGTH.size, deadline))
        if size > _MAX_MESSAGE_BYTES:
            raise _ChildDiedError(f"a message of {size} bytes was announced")
        try:
            return json.loads(self._read(size, deadline))
        except ValueError as error:
            raise _ChildDiedError("it sent something that is not JSON") from error

    def _read(self, size: int, deadline: float) -> bytes:
        data = b""
        while len(data) < size:
            try:
                self._await(self._answers, select.POLLIN, deadline)
                chunk = self._answers.read(size - len(data))
            except ValueError as error:
                raise self._death() from error
            if not chunk:
                raise self._death()
            data += chunk
        return data
