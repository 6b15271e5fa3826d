"""Whose fault it is when a rule fails: the task's at first, the completion's once a rule says so.

A rule first reads what the task gave it. Then it says `blame_completion()`: a time-out, a death or
an exception from there on is a wrong answer, where before it was an error of the task.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


class _Blame:
    tell: Callable[[], None] | None = None
    completion = False


def blame_completion() -> None:
    """From here on, what goes wrong with this verdict is the completion's doing: it fails."""
    if not _Blame.completion:
        _Blame.completion = True
        if _Blame.tell is not None:
            _Blame.tell()


def completion_is_to_blame() -> bool:
    """Whether the rule that runs has said so."""
    return _Blame.completion


def next_task(tell: Callable[[], None] | None = None) -> None:
    """A new task begins, and `tell` is called when its rule blames the completion."""
    _Blame.completion, _Blame.tell = False, tell


@contextmanager
def aside() -> Iterator[None]:
    """What a rule blames that another one asks: it is forgotten when that one goes on."""
    before = _Blame.completion, _Blame.tell
    _Blame.completion, _Blame.tell = False, None
    try:
        yield
    finally:
        _Blame.completion, _Blame.tell = before
