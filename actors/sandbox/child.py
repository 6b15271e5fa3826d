"""The child process of `actors.sandbox.sandbox`, and the framing both sides share.

Run as `python -P -m actors.sandbox.child LIFELINE`, LIFELINE the descriptor of a pipe whose other
end the parent holds open. The protocol is described in `actors.sandbox.sandbox`.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import os
import resource
import shutil
import signal
import struct
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import IO, Any

from actors.sandbox.confinement import close_network, limit_files
from actors.verifiers.base import Verdict
from actors.verifiers.registry import Rule, resolve
from common.errors import UserError
from common.record.schema import ERROR
from common.supervision.processes import descendants

LENGTH = struct.Struct(">I")
_PR_SET_CHILD_SUBREAPER = 36


def end(pid: int, send: Callable[[int, int], None] = os.kill) -> None:
    with contextlib.suppress(ProcessLookupError):
        send(pid, signal.SIGKILL)


def frame(message: Any) -> bytes:
    body = json.dumps(message).encode()
    return LENGTH.pack(len(body)) + body


def main() -> None:
    """The child: read the rules, then groups of tasks, until the parent closes the pipe."""
    folder = os.getcwd()
    guardian = _fork_guardian(int(sys.argv[1]), folder)
    try:
        _serve(*_take_pipes(), guardian)
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # a parent that was killed does not
        end(guardian)


def _serve(requests: IO[bytes], answers: IO[bytes], guardian: int) -> None:
    hello = _read_message(requests)
    if hello is None:
        return
    _limit(hello["memory_bytes"])
    limit_files()
    try:
        if not hello["network"]:
            close_network()
        rules = [resolve(**spec) for spec in hello["rules"]]
    except UserError as error:
        answers.write(frame({"failure": str(error)}))
        return
    answers.write(frame({"failure": ""}))
    me = os.getpid()
    while (tasks := _read_message(requests)) is not None:
        answers.write(frame("begun"))
        for task in tasks:
            _allow_cpu(hello["timeout_s"])
            verdict = _judge(rules[task["rule"]], task)
            if os.getpid() != me:
                os._exit(0)  # a rule forked and let the copy return: only one of us may answer
            signal.setitimer(signal.ITIMER_REAL, 0)
            _end_stragglers(guardian)
            answers.write(frame(asdict(verdict)))


def _judge(rule: Rule, task: dict[str, Any]) -> Verdict:
    try:
        reference = json.loads(task["reference"])
    except ValueError as error:
        return Verdict(ERROR, None, f"{rule.name}: the reference is not JSON: {error}")
    return rule.judge(task["text"], reference)


def _fork_guardian(lifeline: int, folder: str) -> int:
    """Start the process that ends this group, and removes its `folder`, when the
    parent's end of `lifeline` closes: a parent that was killed cannot."""
    guardian = os.fork()
    if guardian == 0:
        os.close(0)
        os.close(1)
        os.read(lifeline, 1)
        group = os.getpgrp()
        os.setsid()
        os.killpg(group, signal.SIGKILL)
        shutil.rmtree(folder, ignore_errors=True)  # gone if the parent had time for it
        os._exit(0)
    os.close(lifeline)
    return guardian


def _take_pipes() -> tuple[IO[bytes], IO[bytes]]:
    """The parent's pipes, moved away from descriptors 0 and 1, which rules read and print to."""
    requests, answers = os.dup(0), os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    os.close(null)
    return os.fdopen(requests, "rb"), os.fdopen(answers, "wb", buffering=0)


def _read_message(requests: IO[bytes]) -> Any:
    header = requests.read(LENGTH.size)
    if len(header) < LENGTH.size:
        return None
    return json.loads(requests.read(*LENGTH.unpack(header)))


def _limit(memory_bytes: int) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform != "linux":
        return  # elsewhere RLIMIT_AS cannot be lowered, and orphans cannot be adopted
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    limit = memory_bytes if hard == resource.RLIM_INFINITY else min(memory_bytes, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _allow_cpu(timeout_s: float) -> None:
    """Processor time for one more task: a bound that holds even when nobody watches."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    soft = math.ceil(usage.ru_utime + usage.ru_stime + 2 * timeout_s + 5)
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    if hard != resource.RLIM_INFINITY:
        soft = min(soft, hard)
    resource.setrlimit(resource.RLIMIT_CPU, (soft, hard))


def _end_stragglers(guardian: int) -> None:
    """Kill what the last task left running, wherever it moved: orphans are adopted by us."""
    while stragglers := [pid for pid in descendants(os.getpid()) if pid != guardian]:
        for pid in stragglers:
            end(pid)
        for pid in stragglers:
            # A grandchild cannot be waited for yet: it becomes ours in the next round.
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)


if __name__ == "__main__":
    main()
