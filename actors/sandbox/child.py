"""The child process of `actors.sandbox.sandbox`, and the framing both sides share.

Run as `python -P -m actors.sandbox.child ACCESS DESK`, DESK the descriptor of a socket by which it
asks for a runner of programs (`actors.sandbox.programs`). The protocol is described in
`actors.sandbox.sandbox`.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import resource
import signal
import struct
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import IO, Any

from actors.sandbox import blame, kernel, programs
from actors.sandbox.confinement import close_network, limit_files, lower_limit
from actors.sandbox.inside import Access, enter
from actors.sandbox.process import end_below
from actors.sandbox.verdict import Verdict
from common.errors import UserError
from common.record.schema import ERROR
from common.supervision.processes import descendants

LENGTH = struct.Struct(">I")
BEGUN, BLAMED = "begun", "the completion is to blame"

Rule = Callable[[str, Any, str, str], Verdict]
"""One rule, on a completion's text, its reference, why it ended and the prompt."""


def frame(message: Any) -> bytes:
    body = json.dumps(message).encode()
    return LENGTH.pack(len(body)) + body


def main() -> None:
    """Read the rules, then groups of tasks, until the parent closes the pipe."""
    enter(Access.from_json(sys.argv[1]))
    programs.use_desk(int(sys.argv[2]))
    _serve(*_take_pipes())


def _serve(requests: IO[bytes], answers: IO[bytes]) -> None:
    hello = _read_message(requests)
    if hello is None:
        return
    _limit(hello["memory_bytes"])
    limit_files()
    try:
        if not hello["network"]:
            close_network()
        rules = _prepare(hello["judge"], hello["rules"])
    except UserError as error:
        answers.write(frame({"failure": str(error)}))
        return
    answers.write(frame({"failure": ""}))
    me, spared = os.getpid(), set(descendants(os.getpid()))  # the guardian, where it is below us
    while (tasks := _read_message(requests)) is not None:
        answers.write(frame(BEGUN))
        for task in tasks:
            _allow_cpu(hello["timeout_s"])
            blame.next_task(lambda: _tell(answers, BLAMED))
            verdict = _judge(rules[task["rule"]], task)
            if os.getpid() != me:
                os._exit(0)  # a rule forked and let the copy return: only one of us may answer
            signal.setitimer(signal.ITIMER_REAL, 0)
            end_below(descendants, spared)
            answers.write(frame(asdict(verdict)))


def _tell(answers: IO[bytes], message: str) -> None:
    answers.write(frame(message))


def _prepare(judge: str, specs: Sequence[dict[str, Any]]) -> Sequence[Rule]:
    """The rules that `judge`, a `module:function` of ours, makes of their descriptions."""
    module, _, function = judge.partition(":")
    prepare: Callable[[Sequence[dict[str, Any]]], Sequence[Rule]] = getattr(
        importlib.import_module(module), function
    )
    return prepare(specs)


def _judge(rule: Rule, task: dict[str, Any]) -> Verdict:
    try:
        reference = json.loads(task["reference"])
    except ValueError as error:
        return Verdict(ERROR, None, f"the reference is not JSON: {error}")
    return rule(task["text"], reference, task["finish_reason"], task["prompt"])


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
    lower_limit(resource.RLIMIT_CORE, 0)
    if sys.platform == "linux":  # elsewhere RLIMIT_AS cannot be lowered, nor orphans adopted
        lower_limit(resource.RLIMIT_AS, memory_bytes)
        kernel.adopt_orphans()


def _allow_cpu(timeout_s: float) -> None:
    """Processor time for one more task: a bound that holds even when nobody watches."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    soft = math.ceil(usage.ru_utime + usage.ru_stime + 2 * timeout_s + 5)
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    if hard != resource.RLIM_INFINITY:
        soft = min(soft, hard)
    resource.setrlimit(resource.RLIMIT_CPU, (soft, hard))


if __name__ == "__main__":
    main()
