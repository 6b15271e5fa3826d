"""The process that runs one program a model wrote, for `actors.verifiers.code_tests`.

Run as `python -P -m actors.verifiers.code_child JOB PROGRAM REPORT`, descriptors of files: the job
is a JSON object, and the report says `ready` once this process is confined, then what the kind of
job wants to know. No expected output of `stdin` and `call` ever comes here.

    stdin     the program is the main module; it reads standard input and prints
    call      the program defines a function, which is called for each list of arguments;
              reported is the JSON list of results
    script    the program has its tests at its end; reported is the job's token, by which the end
              of the tests is told from any other end with exit status 0
"""

from __future__ import annotations

import json
import os
import resource
import runpy
import sys
from typing import Any, SupportsFloat

from actors.sandbox.confinement import compute_only, lower_limit

MAX_OUTPUT_BYTES = 16 * 2**20
MAX_STACK_BYTES = 112 * 2**20
"""Linux keeps 128 MiB free below a stack."""
READY = b"ready\n"


def main() -> None:
    """Read the job, give everything up, run."""
    job_file, program, report = map(int, sys.argv[1:])
    with os.fdopen(job_file, "rb") as file:
        file.seek(0)
        job = json.load(file)
    sys.argv = ["program.py"]
    lower_limit(resource.RLIMIT_FSIZE, MAX_OUTPUT_BYTES)
    lower_limit(resource.RLIMIT_CORE, 0)
    _deepen_stack()
    compute_only()
    os.write(report, READY)
    _KINDS[job["kind"]](job, f"/proc/self/fd/{program}", report)


def _deepen_stack() -> None:
    """Let recursion through C (a cached function that calls itself) go as deep as the recursion
    limit of the suites' graders, 50,000; Linux reads the limit whenever the stack grows."""
    hard = resource.getrlimit(resource.RLIMIT_STACK)[1]
    wanted = MAX_STACK_BYTES if hard == resource.RLIM_INFINITY else min(MAX_STACK_BYTES, hard)
    resource.setrlimit(resource.RLIMIT_STACK, (wanted, hard))


def _stdin(job: dict[str, Any], program: str, report: int) -> None:
    os.close(report)
    runpy.run_path(program, run_name="__main__")


def _call(job: dict[str, Any], program: str, report: int) -> None:
    space = runpy.run_path(program, run_name="program")
    name = job["function"]
    function = getattr(space["Solution"](), name) if "Solution" in space else space[name]
    results = [function(*arguments) for arguments in job["arguments"]]
    os.write(report, json.dumps(results, default=_plain).encode())


def _plain(value: Any) -> Any:
    """A result that JSON does not know: arrays and numbers of numpy, other numbers of Python."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, SupportsFloat):
        return float(value)
    raise TypeError(f"a {type(value).__name__} is no result")


def _script(job: dict[str, Any], program: str, report: int) -> None:
    runpy.run_path(program, run_name="program")
    os.write(report, job["token"].encode())


_KINDS = {"stdin": _stdin, "call": _call, "script": _script}

if __name__ == "__main__":
    main()
