"""Records of HumanEval and LiveCodeBench as a question and the tests `code_tests` runs."""

from __future__ import annotations

import base64
import json
import pickletools
import zlib
from collections.abc import Mapping
from typing import Any

from actors.verifiers.code_tests import pack

_OPENED = (
    *("string", "re", "datetime", "collections", "heapq", "bisect", "copy", "math", "random"),
    *("statistics", "itertools", "functools", "operator", "io", "sys", "json"),
)
LIVE_CODE_BENCH_SETUP = "".join(
    [
        *(f"from {module} import *\n" for module in (*_OPENED, "builtins", "typing")),
        *(f"import {module}\n" for module in _OPENED),
        "sys.setrecursionlimit(50000)\n",
        "sys.set_int_max_str_digits(50000)\n",
    ]
)
"""What LiveCodeBench's own grader runs before a program, in its order: later names hide earlier
ones. Source: `import_string` of lcb_runner/evaluation/testing_util.py in the suite's repository;
the last line is that of compute_code_generation_metrics.py beside it."""
LIVE_CODE_BENCH_SCRIPT = (
    LIVE_CODE_BENCH_SETUP
    + "def _leave(*_):\n    raise SystemExit\nsys.exit = exit = quit = _leave\n"
)
"""What stands before a program that reads standard input. The suite's grader looks at what such a
program has printed, not at how it leaves: its `call_method` takes `SystemExit` for an end."""


def human_eval(record: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Chen et al. 2021 (arXiv 2107.03374). The prompt, a signature with its docstring, is put
    before the program, so that what it imports and defines is there for one that leaves it out."""
    prompt, entry = str(record["prompt"]), str(record["entry_point"])
    if not entry.isidentifier():
        raise ValueError(f"entry_point {entry!r} is no name")
    script = f"{record['test']}\n\ncheck({entry})\n"
    return prompt, {"tests": {"kind": "script", "setup": prompt, "script": script}}


def live_code_bench(record: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Jain et al. 2024 (arXiv 2403.07974): programs that read standard input, or LeetCode's
    functions where there is code to start from. All tests count, public and private."""
    cases = json.loads(record["public_test_cases"]) + hidden_cases(record["private_test_cases"])
    pairs = [(str(case["input"]), str(case["output"])) for case in cases]
    starter = record.get("starter_code") or ""
    question = str(record["question_content"])
    tests: dict[str, Any] = {"kind": "stdin", "setup": LIVE_CODE_BENCH_SCRIPT, "cases": pack(pairs)}
    if cases[0]["testtype"] == "functional":
        function = json.loads(record["metadata"])["func_name"]
        tests |= {"kind": "call", "function": function, "setup": LIVE_CODE_BENCH_SETUP}
        form = f"Complete this code:\n\n```python\n{starter}\n```"
    else:
        form = "The program reads standard input and prints its answer to standard output."
    return f"{question}\n\n{form}", {"tests": tests}


def hidden_cases(stored: str) -> list[dict[str, Any]]:
    """Private tests: JSON, or base64 of a compressed pickle of JSON text.

    The pickle is not loaded, which could run anything: its one text is read off its instructions.
    Raises: `ValueError` for anything else.
    """
    try:
        cases: list[dict[str, Any]] = json.loads(stored)
        return cases
    except ValueError:
        pass  # the packed form
    try:
        pickled = zlib.decompress(base64.b64decode(stored))
        steps = [(step.name, argument) for step, argument, _ in pickletools.genops(pickled)]
    except (ValueError, zlib.error) as error:
        raise ValueError(f"private tests cannot be read: {error}") from error
    texts = [argument for name, argument in steps if name.endswith("UNICODE")]
    others = {name for name, _ in steps if not name.endswith("UNICODE")} - _TEXT_ALONE
    if len(texts) != 1 or others:
        raise ValueError("private tests cannot be read: they are no pickled text")
    return list(json.loads(str(texts[0])))


_TEXT_ALONE = {"PROTO", "FRAME", "PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE", "STOP"}
"""Instructions beside the text itself in the pickle of one."""
