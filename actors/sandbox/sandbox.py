"""Verdicts in a child process that can be killed.

`Sandbox` keeps one child alive (`actors.sandbox.child`) and hands it the tasks of a group. One
message is four bytes of length and a JSON value. The child says when it begins and answers task
by task, so the parent always knows which task it is on, or that it is on none:

    parent: rules -> child: ready | failure
    parent: tasks -> child: begun, verdict, verdict, ...     each within `timeout_s`, or SIGKILL

Who ends whom. The child leads a session of its own, and the parent kills that whole group, and on
Linux what has left it. A *guardian*, forked by the child before anything else, blocks on a
pipe the parent holds open: when the parent is gone, however it went, the guardian kills the
group. (PR_SET_PDEATHSIG would do it for the child alone, and would fire when the *thread* that
started the child ends.) Rules run on the child's main thread, where SIGALRM works, with the
environment of `_environment` and no more, in an empty folder; their standard output is discarded.
What else they may not do stands in `actors.sandbox.confinement`.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from actors.sandbox.child import LENGTH, end, frame
from actors.verifiers.base import Verdict
from common.errors import RunError, UserError, VerifierError
from common.record.schema import ERROR, TIMEOUT
from common.supervision.processes import descendants

MEMORY_LIMIT_BYTES = 4 * 2**30
MAX_PROCESSES = 32
"""Of a rule, at one time. The kernel's own limit counts a whole user's, and not root's."""
START_TIMEOUT_S = 120.0
_EXIT_TIMEOUT_S = 10.0
_HAND_OVER_TIMEOUT_S = 30.0
_HAND_OVERS = 3
_POLL_MS = 50
_MAX_MESSAGE_BYTES = 2**20
_INHERITED = ("PATH", "HOME", "TMPDIR", "LANG", "LC_ALL", "LD_LIBRARY_PATH")


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


class _ChildDiedError(Exception):
    """The child ended, or spoke out of turn, where a message was due."""


class Sandbox:
    """One child process. `score` and `wait_ready` belong to one thread, `close` to any.

    The constructor starts the child and returns; the first `wait_ready` waits for its imports.
    """

    _ready: bool
    _ready_deadline: float

    def __init__(
        self,
        rules: Sequence[RuleSpec],
        timeout_s: float,
        memory_bytes: int = MEMORY_LIMIT_BYTES,
        start_timeout_s: float = START_TIMEOUT_S,
        network: bool = False,
    ) -> None:
        self._rules = tuple(rules)
        self._hello = {
            "rules": [asdict(rule) for rule in rules],
            "timeout_s": timeout_s,
            "memory_bytes": memory_bytes,
            "network": network,
        }
        self._timeout_s = timeout_s
        self._start_timeout_s = start_timeout_s
        self._lock = threading.Lock()
        self._closed = False
        self._start()

    @property
    def pid(self) -> int:
        """The child's process id, which is also its group's."""
        return self._process.pid

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
                verdicts.append(Verdict(TIMEOUT, None, self._blame(tasks[len(verdicts)], reason)))
                self._restart()
            except _ChildDiedError as death:
                reason = f"ended its process: {death}"
                verdicts.append(Verdict(ERROR, None, self._blame(tasks[len(verdicts)], reason)))
                self._restart()
        return verdicts

    def close(self) -> None:
        """End the child and everything it started. Safe to call twice, from any thread."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._kill()

    def _blame(self, task: Task, reason: str) -> str:
        return f"{self._rules[task.rule].name}: {reason}"

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
            answer = self._receive(time.monotonic() + self._timeout_s)
            try:
                verdicts.append(Verdict(**answer))
            except (TypeError, ValueError) as error:
                raise _ChildDiedError(f"it sent {answer!r:.80}, which is no verdict") from error

    def _start(self) -> None:
        with self._lock:
            if self._closed:
                raise RunError("the verifier sandbox is closed")
            guardian_end, parent_end = os.pipe()
            self._folder = tempfile.TemporaryDirectory(prefix="grpo-lambda-verifier-")
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "actors.sandbox.child", str(guardian_end)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                pass_fds=(guardian_end,),
                start_new_session=True,
                env=_environment(),
                cwd=self._folder.name,
                bufsize=0,
            )
            os.close(guardian_end)
            # A file object, so that the pipe closes with the sandbox when nobody calls close().
            self._lifeline: IO[bytes] = os.fdopen(parent_end, "wb", buffering=0)
            assert self._process.stdin is not None
            assert self._process.stdout is not None
            self._requests, self._answers = self._process.stdin, self._process.stdout
            os.set_blocking(self._requests.fileno(), False)
            self._ready = False
            self._ready_deadline = time.monotonic() + self._start_timeout_s

    def _restart(self) -> None:
        with self._lock:
            if not self._closed:
                self._kill()
        self._start()

    def _kill(self) -> None:
        # The id of a child that has been waited for may already be another process's.
        escaped = descendants(self._process.pid) if self._process.poll() is None else []
        end(self._process.pid, os.killpg)
        for pid in escaped:
            end(pid)
        self._process.wait(timeout=_EXIT_TIMEOUT_S)
        for pipe in (self._requests, self._answers, self._lifeline):
            pipe.close()
        self._folder.cleanup()

    def _death(self) -> _ChildDiedError:
        try:
            code = self._process.wait(timeout=_POLL_MS / 1000)
        except subprocess.TimeoutExpired:
            return _ChildDiedError("it closed its pipe")
        if code >= 0:
            return _ChildDiedError(f"exit status {code}")
        return _ChildDiedError(f"signal {signal.Signals(-code).name}")

    def _await(self, pipe: IO[bytes], event: int, deadline: float) -> None:
        """Return when `pipe` is ready. Death is looked for too: a process that a rule left behind
        may hold the other end of the pipe open. So are too many processes."""
        poll = select.poll()
        poll.register(pipe, event)
        while not poll.poll(_POLL_MS):
            if self._process.poll() is not None:
                raise self._death()
            if len(descendants(self._process.pid, MAX_PROCESSES + 2)) > MAX_PROCESSES + 1:
                raise _ChildDiedError(f"it was ended, with more than {MAX_PROCESSES} processes")
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


def _environment() -> dict[str, str]:
    """No credentials, one thread, and the parent's import path (the shipped working directory)."""
    kept = {name: os.environ[name] for name in _INHERITED if name in os.environ}
    paths = [str(Path(entry).resolve()) if entry else os.getcwd() for entry in sys.path]
    return kept | {
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONWARNINGS": "ignore",
        "PYTHONHASHSEED": "0",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }
