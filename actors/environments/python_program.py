"""What runs in the process of a program that the policy wrote with the tool `python`.

The process is confined before `run` begins (`actors.sandbox.runner`). It knows nothing of the task.
"""

from __future__ import annotations

import ast
import linecache
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any

_NAME = "program.py"


def run(handed: Sequence[int]) -> None:
    """Run the program whose text is in the descriptor that was handed over.

    A last line that is an expression is printed, as an interactive interpreter does. So is the
    traceback of what the program raises.
    """
    (source,) = handed
    with os.fdopen(source, "rb") as file:
        text = file.read().decode("utf-8", "replace")
    lines = text.splitlines(keepends=True)
    linecache.cache[_NAME] = (len(text), None, lines, _NAME)
    space: dict[str, Any] = {"__name__": "__main__"}
    try:
        body, last = _parts(text)
        exec(compile(body, _NAME, "exec", dont_inherit=True), space)
        if last is not None:
            value = eval(compile(last, _NAME, "eval", dont_inherit=True), space)
            if value is not None:
                print(repr(value))
    except Exception as error:
        _print_traceback(error)
    finally:
        sys.stdout.flush()


def _parts(text: str) -> tuple[ast.Module, ast.Expression | None]:
    """The program, and its last line where that is an expression."""
    tree = ast.parse(text, _NAME)
    if not tree.body or not isinstance(tree.body[-1], ast.Expr):
        return tree, None
    last = tree.body.pop()
    assert isinstance(last, ast.Expr)
    return tree, ast.Expression(last.value)


def _print_traceback(error: Exception) -> None:
    """Without the frames of this file, which are not the program's."""
    frames = error.__traceback__
    while frames is not None and frames.tb_frame.f_code.co_filename != _NAME:
        frames = frames.tb_next
    for part in traceback.format_exception(type(error), error, frames):
        print(part, end="")
