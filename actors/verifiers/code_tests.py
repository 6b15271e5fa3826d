"""Programs that a model wrote, against the tests of their problem.

The program is a fenced block of the completion (`actors.verifiers.program`). It runs in a process
of its own behind walls (`actors.sandbox.programs`): no other process, no signal, no socket, no file
changed, 16 MiB of output, and a limit of time after which it is killed.

No expected result is in a process that a program can reach. Outputs (`stdin`) and results (`call`)
come back and are compared here; a `script` runs in a process of the judge's and takes plain values
from the program (`actors.verifiers.script`). What a program does wrong, by itself, to its judge or
against its limits, fails it; `error` is kept for tests that cannot be read, and machines that have
no walls.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import signal
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from actors.sandbox.blame import blame_completion
from actors.sandbox.programs import Ended, RunnerLostError, programs
from actors.verifiers.base import Verdict
from actors.verifiers.outputs import same_output, same_value
from actors.verifiers.program import find_program
from actors.verifiers.script import CANNOT_JUDGE, PASSED, check_script, run_script
from actors.verifiers.thoughts import answer_part
from common.errors import UserError, VerifierError

_PROGRAMS = "actors.verifiers.code_child"
_MAX_OUTPUT_BYTES = 16 * 2**20
_BLANK = r"(?:[ \t]*(?:#[^\n]*)?\n)*"
_FUTURE = re.compile(rf"{_BLANK}(?:from __future__ import [^\n]*\n{_BLANK})+")


@dataclass
class _Judged:
    """What is known of a program so far."""

    failure: str = ""
    """Why it is wrong; empty while it is right."""
    touched: str = ""
    """Walls that it touched, see `Ended.kinds`."""


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
    finish_reason: str = "",
    prompt: str = "",
) -> Verdict:
    """1.0 when the program in `text` passes all tests of `reference["tests"]`, else 0.0.

    Args:
        seconds: limit of a case, wall-clock: a process of `stdin`, one call of `call`, all of a
            `script`.
        total_seconds: limit of all cases together; below the verifier's own deadline.

    Raises:
        ValueError: the prompt has no tests that can be read.
        VerifierError: programs cannot be confined on this machine; or a script of tests hands the
            program something that is no plain value (`actors.verifiers.script`).
    """
    tests = reference.get("tests")
    if not isinstance(tests, dict) or tests.get("kind") not in _JUDGES:
        raise ValueError("the prompt has no tests: code_tests is for code suites")
    program = find_program(answer_part(text, prompt), complete=finish_reason == "stop")
    if program is None:
        return Verdict.scored(0.0, "no fenced block of Python")
    judge = _JUDGES[tests["kind"]]
    program = behind_setup(tests.get("setup", ""), program)
    judged = judge(program, tests, seconds, total_seconds)
    return Verdict.scored(float(not judged.failure), judged.failure, judged.touched)


def check_reference(reference: dict[str, Any]) -> None:
    """Raise `ValueError` when there are no tests, or none that can be read."""
    tests = reference.get("tests")
    if not isinstance(tests, dict) or tests.get("kind") not in _JUDGES:
        raise ValueError("the row has no tests for code_tests: a column `tests` with their kind")
    if tests["kind"] != "script":
        unpack(tests["cases"])


def warm_up() -> None:
    """Have a process for programs before the first one is due."""
    programs(_PROGRAMS).start()


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


def _judge_stdin(program: str, tests: dict[str, Any], seconds: float, total: float) -> _Judged:
    cases = unpack(tests["cases"])
    blame_completion()
    judged, ends = _Judged(), time.monotonic() + total
    for number, (given, expected) in enumerate(cases, 1):
        left_s = min(seconds, ends - time.monotonic())
        if left_s <= 0:
            judged.failure = f"time limit of all cases at case {number} of {len(cases)}"
            return judged
        with _files(3) as (source, stdin, stdout):
            _write(source, program)
            _write(stdin, given)
            _run(judged, "run_stdin", [stdin, stdout, source], left_s)
            if not judged.failure and not same_output(_content(stdout), expected):
                judged.failure = "wrong output"
        if judged.failure:
            judged.failure += f" at case {number} of {len(cases)}"
            return judged
    return judged


def _judge_call(program: str, tests: dict[str, Any], seconds: float, total: float) -> _Judged:
    cases = [(given, json.loads(expected)) for given, expected in unpack(tests["cases"])]
    arguments = [[json.loads(line) for line in given.split("\n") if line] for given, _ in cases]
    blame_completion()
    judged = _Judged()
    job = {"function": tests["function"], "arguments": arguments, "seconds": seconds}
    with _files(5) as (source, stdin, stdout, asked, report):
        _write(source, program)
        _write(asked, json.dumps(job))
        _run(judged, "run_call", [stdin, stdout, source, asked, report], total)
        if not judged.failure:
            judged.failure = _wrong_result(_content(report), [expected for _, expected in cases])
    return judged


def _wrong_result(report: bytes, wanted: list[Any]) -> str:
    try:
        results = json.loads(report)
    except (ValueError, RecursionError):
        results = None
    if not isinstance(results, list) or len(results) != len(wanted):
        return "it ended before its function had returned"
    for number, (result, expected) in enumerate(zip(results, wanted, strict=True), 1):
        if not same_value(result, expected):
            return f"wrong result at case {number} of {len(wanted)}"
    return ""


def _judge_script(program: str, tests: dict[str, Any], seconds: float, total: float) -> _Judged:
    setup, script = str(tests.get("setup", "")), str(tests["script"])
    check_script(setup, script)
    blame_completion()
    judged, ends = _Judged(), time.monotonic() + seconds
    with _files(4) as (source, stdin, stdout, report):
        _write(source, program)
        (asked, ask), (answered, answer) = os.pipe(), os.pipe()
        judge = run_script(setup, script, ask, answered, report, [asked, answer])
        try:
            os.close(ask)
            os.close(answered)
            _run(judged, "run_script", [stdin, stdout, source, asked, answer], seconds)
        finally:
            os.close(asked)
            os.close(answer)
            told = _wait(judge, ends) and _content(report).decode()
        if told and told.startswith(CANNOT_JUDGE):
            raise VerifierError(f"the tests {told}")
        if not told:
            judged.failure = "time limit"
        elif not judged.failure:
            judged.failure = "" if told == PASSED else told
    return judged


_JUDGES = {"stdin": _judge_stdin, "call": _judge_call, "script": _judge_script}


def _run(judged: _Judged, entry: str, handed: Sequence[int], seconds: float) -> None:
    """Run a program and note how it ended.

    Raises: `VerifierError` where it could not be confined.
    """
    try:
        ended = programs(_PROGRAMS).run(entry, handed, seconds)
    except RunnerLostError:
        judged.failure, judged.touched = "it ended the process that ran it", "judge"
        return
    if ended.failure and ended.status != -signal.SIGKILL:
        raise VerifierError(f"a program could not be confined: {ended.failure}")
    judged.failure = _how_it_ended(ended)
    judged.touched = ",".join(sorted({*judged.touched.split(","), *ended.kinds.split(",")} - {""}))


def _how_it_ended(ended: Ended) -> str:
    if ended.status is None:
        return ended.reason
    if ended.status == -signal.SIGALRM:
        return "time limit of a call"
    return f"exit status {ended.status}" if ended.status else ""


def _wait(pid: int, ends: float) -> bool:
    """Whether a process of ours ends in time; it is gone afterwards in any case."""
    while not (done := os.waitpid(pid, os.WNOHANG)[0]) and time.monotonic() < ends:
        time.sleep(0.002)
    if not done:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return bool(done)


@contextlib.contextmanager
def _files(count: int) -> Iterator[list[int]]:
    """Files in memory that no folder names: everything goes through them, so that nobody waits for
    a full pipe."""
    opened = [os.memfd_create("program") for _ in range(count)]
    try:
        yield opened
    finally:
        for descriptor in opened:
            os.close(descriptor)


def _write(descriptor: int, text: str) -> None:
    left = memoryview(text.encode("utf-8", "replace"))
    while left:
        left = left[os.write(descriptor, left) :]
    os.lseek(descriptor, 0, os.SEEK_SET)


def _content(descriptor: int) -> bytes:
    os.lseek(descriptor, 0, os.SEEK_SET)
    with os.fdopen(descriptor, "rb", closefd=False) as file:
        return file.read(_MAX_OUTPUT_BYTES)
