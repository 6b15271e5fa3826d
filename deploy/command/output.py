"""Standard output that may be closed, or have no room: `plan | head`, a full disk.

A verb that only prints ends: quietly where nobody reads any more, else with the cause. A verb that
trains or evaluates goes on; what it would have said is in its folder.
"""

from __future__ import annotations

import os
from typing import Any, TextIO

from common.errors import RunError


class NobodyReadsError(RunError):
    """Standard output was closed by who read it."""

    exit_code = 141  # as a shell says of a program that SIGPIPE has ended


class Output:
    """Standard output whose errors end the verb, or are let pass.

    Args:
        goes_on: the verb does not end when nobody can be told.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.goes_on = False

    def write(self, text: str) -> int:
        """Write, as a file does."""
        try:
            return self._stream.write(text)
        except OSError as error:
            self._give_up(error)
        return len(text)

    def flush(self) -> None:
        """Flush, as a file does."""
        try:
            self._stream.flush()
        except OSError as error:
            self._give_up(error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _give_up(self, error: OSError) -> None:
        """What is buffered, and all that comes, goes nowhere from now on."""
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self._stream.fileno())
        os.close(null)
        if self.goes_on:
            return
        if isinstance(error, BrokenPipeError):
            raise NobodyReadsError from error
        raise RunError(f"standard output cannot be written: {error.strerror}") from error
