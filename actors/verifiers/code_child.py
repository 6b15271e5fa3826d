"""What runs in the process of one program a model wrote: the entry points for `code_tests`.

The process is confined before any of them begins (`actors.sandbox.runner`). Nothing that tells a
right result from a wrong one ever comes here: the program gets its input, and gives its output.

    run_stdin     the program is the main module; it reads standard input and prints
    run_call      the program defines a function, which is called for each list of arguments; the
                  JSON list of results is written to the last descriptor
    run_script    the program stays at the service of a test script in another process, which asks
                  for its names, calls its functions, and is given plain values
"""

from __future__ import annotations

import contextlib
import json
import linecache
import os
import signal
import sys
import types
from collections.abc import Iterator, Sequence
from typing import Any, SupportsFloat

from actors.verifiers.values import Handles, read_message, write_message

_NAME = "program.py"


def run_stdin(handed: Sequence[int]) -> None:
    """Descriptors: the program's text."""
    (source,) = handed
    _execute(source, "__main__")


def run_call(handed: Sequence[int]) -> None:
    """Descriptors: the program's text, the job (`function`, `arguments`), the report."""
    source, job_file, report = handed
    job = json.loads(_content(job_file))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    with _at_most(job["seconds"]):
        space = _execute(source, "program")
        name = job["function"]
        function = getattr(space["Solution"](), name) if "Solution" in space else space[name]
    results = []
    for arguments in job["arguments"]:
        with _at_most(job["seconds"]):
            results.append(function(*arguments))
    left = memoryview(json.dumps(results, default=_plain).encode())
    while left:
        left = left[os.write(report, left) :]


@contextlib.contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """End this process by SIGALRM when the block takes longer.

    A program can undo it, and gains no more than the limit of the whole process.
    """
    signal.setitimer(signal.ITIMER_REAL, seconds)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)


def run_script(handed: Sequence[int]) -> None:
    """Descriptors: the program's text, questions to it, answers from it."""
    source, questions, answers = handed
    space = _execute(source, "program")
    handles = Handles()
    while (question := read_message(questions)) is not None:
        write_message(answers, _answer(question, space, handles))


def _answer(question: dict[str, Any], space: dict[str, Any], handles: Handles) -> dict[str, Any]:
    """What the program does when asked: a value and its arguments as they are afterwards, or the
    name and text of what it raised."""
    try:
        subject = handles.find(question["of"])
        positional = handles.decode(question["positional"])
        named = handles.decode(question["named"])
        match question["ask"]:
            case "name":
                value = _named(space, positional[0])
            case "attribute":
                value = getattr(subject, positional[0])
            case "assign":
                setattr(subject, *positional)
                value = None
            case _:
                value = subject(*positional, **named)
        return {"value": handles.encode(value), "positional": handles.encode(positional)}
    except Exception as error:
        return {"raised": [cls.__name__ for cls in type(error).__mro__], "text": str(error)[:500]}


def _named(space: dict[str, Any], name: str) -> Any:
    if name not in space:
        raise NameError(f"the program has no {name}")
    return space[name]


def _execute(source: int, name: str) -> dict[str, Any]:
    """Run the program as the module `name`; returns its names."""
    text = _content(source)
    module = types.ModuleType(name)
    module.__file__ = _NAME
    sys.modules[name] = module
    lines = text.decode("utf-8", "replace").splitlines(keepends=True)
    linecache.cache[_NAME] = (len(text), None, lines, _NAME)
    exec(compile(text, _NAME, "exec", dont_inherit=True), module.__dict__)
    return module.__dict__


def _content(descriptor: int) -> bytes:
    with os.fdopen(descriptor, "rb") as file:
        file.seek(0)
        return file.read()


def _plain(value: Any) -> Any:
    """A result that JSON does not know: arrays and numbers of numpy, other numbers of Python."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, SupportsFloat):
        return float(value)
    raise TypeError(f"a {type(value).__name__} is no result")
