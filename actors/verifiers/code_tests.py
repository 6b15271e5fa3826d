"""Programs that a model wrote, against the tests of their problem.

The program is a fenced block of the completion (`actors.verifiers.program`). It runs in a process
of its own (`actors.verifiers.code_child`), below the sandbox of all rules and confined further: no
other process, no signal, no socket, no file changed, 16 MiB of output, and a limit of time after
which it is killed. What a program does wrong, by itself or against these limits, fails it; `error`
is kept for tests that cannot be read and machines that cannot confine.

It is no wall against a program that means harm: files of the user can be read (and not sent
anywhere), and a program under test by `script` shares a process with its tests, so one that
searches its interpreter, or returns objects that equal everything, may pass.
"""

from __future__ import annotations

import base64
import json
import re
import secrets
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO, Any

from actors.verifiers.base import Verdict, after_thinking
from actors.verifiers.code_child import MAX_OUTPUT_BYTES, READY
from actors.verifiers.outputs import same_output, same_value
from actors.verifiers.program import find_program
from common.errors import UserError

_BLANK = r"(?:[ \t]*(?:#[^\n]*)?\n)*"
_FUTURE = re.compile(rf"{_BLANK}(?:from __future__ import [^\n]*\n{_BLANK})+")


@dataclass(frozen=True)
class _Run:
    """How a program ended: `status` None is the limit of time."""

    status: int | None
    output: bytes
    report: bytes

    @property
    def failure(self) -> str:
        """What went wrong before any output is looked at; empty when nothing did."""
        if self.status is None:
            return "time limit"
        return f"exit status {self.status}" if self.status else ""


def check_args(seconds: float = 10.0, total_seconds: float = 60.0) -> None:
    """Raise `UserError` for limits that are no times."""
    if not 0 < seconds <= total_seconds:
        raise UserError(
            f"code_tests: seconds={seconds} must be positive and at most "
            f"total_seconds={total_seconds}"
        )


def score(
    text: str,
    reference: dict[str, Any],
    seconds: float = 10.0,
    total_seconds: float = 60.0,
) -> Verdict:
    """1.0 when the program in `text` passes all tests of `reference["tests"]`, else 0.0.

    Args:
        seconds: limit of one process, wall-clock; a case of `stdin`, all of `call` or `script`.
        total_seconds: limit of all cases together; below the verifier's own deadline.

    Raises:
        ValueError: the prompt has no tests that can be read.
        RuntimeError: programs cannot be confined on this machine.
    """
    tests = reference.get("tests")
    if not isinstance(tests, dict) or tests.get("kind") not in _JUDGES:
        raise ValueError("the prompt has no tests: code_tests is for code suites")
    program = find_program(after_thinking(text), complete=False)
    if program is None:
        return Verdict.scored(0.0, "no fenced block of Python")
    program = behind_setup(tests.get("setup", ""), program)
    failure = _JUDGES[tests["kind"]](program, tests, seconds, total_seconds)
    return Verdict.scored(float(not failure), failure)


def behind_setup(setup: str, program: str) -> str:
    """`program` behind `setup`, but for its imports from `__future__`, which must come first."""
    found = _FUTURE.match(program)
    head = found.group() if found else ""
    return f"{head}{setup}\n{program.removeprefix(head)}"


def pack(cases: Sequence[tuple[str, str]]) -> str:
    """(input, expected output) pairs as short text: hidden tests may have megabytes."""
    return base64.b64encode(zlib.compress(json.dumps(cases).encode())).decode()


def unpack(packed: str) -> list[tuple[str, str]]:
    """The inverse of `pack`. Raises: `ValueError` for anything else, or no case."""
    try:
        cases = json.loads(zlib.decompress(base64.b64decode(packed)))
        pairs = [(str(given), str(expected)) for given, expected in cases]
    except (ValueError, TypeError, zlib.error) as error:
        raise ValueError(f"the tests of the prompt cannot be read: {error}") from error
    if not pairs:
        raise ValueError("the prompt has no test cases")
    return pairs


def _judge_stdin(program: str, tests: dict[str, Any], seconds: float, total: float) -> str:
    ends = time.monotonic() + total
    cases = unpack(tests["cases"])
    for number, (given, expected) in enumerate(cases, 1):
        left_s = min(seconds, ends - time.monotonic())
        if left_s <= 0:
            return f"time limit of all cases at case {number} of {len(cases)}"
        ran = _run({"kind": "stdin"}, program, given, left_s)
        wrong = ran.failure or ("" if same_output(ran.output, expected) else "wrong output")
        if wrong:
            return f"{wrong} at case {number} of {len(cases)}"
    return ""


def _judge_call(program: str, tests: dict[str, Any], seconds: float, total: float) -> str:
    cases = unpack(tests["cases"])
    arguments = [[json.loads(line) for line in given.split("\n") if line] for given, _ in cases]
    job = {"kind": "call", "function": tests["function"], "arguments": arguments}
    ran = _run(job, program, "", total)
    if ran.failure:
        return ran.failure
    try:
        results = json.loads(ran.report)
    except ValueError:
        return "it ended before its function had returned"
    if not isinstance(results, list) or len(results) != len(cases):
        return "it ended before its function had returned"
    for number, (result, (_, expected)) in enumerate(zip(results, cases, strict=True), 1):
        if not same_value(result, json.loads(expected)):
            return f"wrong result at case {number} of {len(cases)}"
    return ""


def _judge_script(program: str, tests: dict[str, Any], seconds: float, total: float) -> str:
    token = secrets.token_hex(16)
    tested = f"{program}\n\n{tests['script']}\n"
    ran = _run({"kind": "script", "token": token}, tested, "", seconds)
    if ran.failure:
        return ran.failure
    return "" if ran.report == token.encode() else "it ended before its tests had"


_JUDGES = {"stdin": _judge_stdin, "call": _judge_call, "script": _judge_script}


def _run(job: dict[str, Any], program: str, given: str, seconds: float) -> _Run:
    """One process. Everything goes through files, so that nobody waits for a full pipe."""
    with (
        tempfile.TemporaryFile() as job_file,
        tempfile.TemporaryFile() as source,
        tempfile.TemporaryFile() as stdin,
        tempfile.TemporaryFile() as stdout,
        tempfile.TemporaryFile() as report,
    ):
        job_file.write(json.dumps(job).encode())
        source.write(program.encode("utf-8", "replace"))
        stdin.write(given.encode("utf-8", "replace"))
        for file in (job_file, source):
            file.flush()
        stdin.seek(0)
        handed_over = [file.fileno() for file in (job_file, source, report)]
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "actors.verifiers.code_child", *map(str, handed_over)],
            stdin=stdin,
            stdout=stdout,
            stderr=subprocess.DEVNULL,
            pass_fds=handed_over,
        )
        try:
            status: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            process.kill()  # it can have started no other
            process.wait()
        told = _content(report)
        if not told.startswith(READY) and status is not None:
            raise RuntimeError("a program could not be confined: this needs Linux with seccomp")
        return _Run(status, _content(stdout), told[len(READY) :])


def _content(file: IO[bytes]) -> bytes:
    file.seek(0)
    return file.read(MAX_OUTPUT_BYTES)
