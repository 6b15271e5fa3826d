"""Verdicts a second on honest programs, behind all walls and beside that behind fewer.

    PYTHONPATH=.:tests/support python tests/bench/rows_sandbox.py [CHECKOUT]

CHECKOUT is a folder with another state of this project (`git worktree add CHECKOUT COMMIT`): its
sandbox takes turns with this one. Without it, the same sandbox stands beside it without
bubblewrap, user ids and Landlock: what these cost.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness import ROOT, Row, emit

from actors.sandbox.sandbox import RuleSpec, Sandbox, Task
from actors.verifiers import registry
from actors.verifiers.code_tests import pack

REPEATS, PROGRAMS, TARGET = 7, 60, 0.8

_CALL = {"kind": "call", "function": "f", "cases": pack([("7", "49"), ("2", "4")])}
_STDIN = {"kind": "stdin", "cases": pack([("7\n", "49"), ("2\n", "4"), ("0\n", "0")])}
_SCRIPT = {"kind": "script", "setup": "", "script": "assert f(7) == 49\nassert f(2) == 4"}
_FUNCTION = "def f(x):\n    return x * x"
_WHOLE = "print(int(input()) ** 2)"
HONEST = [(_FUNCTION, _CALL), (_WHOLE, _STDIN), (_FUNCTION, _SCRIPT)]


def tasks(count: int) -> list[Task]:
    """Programs of every kind of tests in turn."""
    return [
        Task(0, f"```python\n{program}\n```", json.dumps({"tests": tests}))
        for program, tests in (HONEST[index % len(HONEST)] for index in range(count))
    ]


def open_sandbox(*, bare: bool) -> Sandbox:
    given: tuple[Any, ...] = ([RuleSpec("code", "code_tests", {})], 120.0)
    if hasattr(registry, "JUDGE"):  # other states of the project have sandboxes for rules alone
        given = (registry.JUDGE, *given)
    make: Callable[..., Sandbox] = Sandbox
    if not bare:
        return make(*given)
    from actors.sandbox.walls import Walls

    return make(*given, walls=Walls(calls=True, landlock=0), trusted=True)


def serve(*, bare: bool) -> None:
    """Measure once for every line that is read: seconds for `PROGRAMS` verdicts."""
    sandbox = open_sandbox(bare=bare)
    try:
        sandbox.score(tasks(6))  # starts what there is to start
        print("ready", flush=True)
        for _ in sys.stdin:
            started = time.perf_counter()
            verdicts = sandbox.score(tasks(PROGRAMS))
            seconds = time.perf_counter() - started
            assert all(verdict.kind == "pass" for verdict in verdicts), verdicts
            print(seconds, flush=True)
    finally:
        sandbox.close()


class Measured:
    """A process of its own with one sandbox."""

    def __init__(self, tree: Path, mode: str) -> None:
        paths = [str(tree), str(ROOT / "tests" / "support"), str(Path(__file__).parent)]
        self._process = subprocess.Popen(
            [sys.executable, __file__, mode],
            cwd=tree,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._read() == "ready"

    def seconds(self) -> float:
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        return float(self._read())

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)

    def _read(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()


def main(before: Path | None) -> None:
    other = Measured(before, "serve") if before else Measured(ROOT, "serve-bare")
    ours = Measured(ROOT, "serve")
    rates, ratios = [], []
    for _ in range(REPEATS):
        mine, beside = ours.seconds(), other.seconds()
        rates.append(PROGRAMS / mine)
        ratios.append(beside / mine)
    ours.close()
    other.close()
    against = f"the sandbox of {before.name}" if before else "the same without walls but the filter"
    detail = f"{sorted(rates)[REPEATS // 2]:.0f} verdicts/s"
    emit([Row("honest programs judged", against, ratios, TARGET, True, detail)])


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["serve"]:
            serve(bare=False)
        case ["serve-bare"]:
            serve(bare=True)
        case rest:
            main(Path(rest[0]).resolve() if rest else None)
