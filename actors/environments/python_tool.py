"""An environment with one tool: it runs Python programs that the policy writes.

A program runs in a process of its own that computes and does nothing else (`actors.sandbox`). That
process comes from a runner which was forked before the episode began, so neither holds the task.
`verifier.rules` judge the episode.
"""

from __future__ import annotations

import os

from actors.environments.tools import ToolEnvironment
from actors.environments.wire import cut_middle
from actors.sandbox.programs import RunnerLostError

_MAX_OUTPUT_BYTES = 2**20


class Python(ToolEnvironment):
    """Runs programs. Each starts afresh: nothing is kept from one call to the next."""

    programs = "actors.environments.python_program"

    def __init__(self, timeout_s: float = 5.0, output_characters: int = 4000) -> None:
        """Keep the limits of a program.

        Args:
            timeout_s: seconds; below `environment.step_timeout_s`.
            output_characters: of what it prints; the middle of more is left out.
        """
        self._timeout_s = timeout_s
        self._output_characters = output_characters

    def python(self, code: str) -> str:
        """Run a Python program, and return what it prints.

        Args:
            code: The program. It has no network and no files, and remembers no earlier one.
        """
        source, nothing, output = (os.memfd_create(name) for name in ("source", "in", "out"))
        try:
            os.write(source, code.encode("utf-8", "replace"))
            os.lseek(source, 0, os.SEEK_SET)
            how = self._run([nothing, output, source])
            os.lseek(output, 0, os.SEEK_SET)
            printed = os.read(output, _MAX_OUTPUT_BYTES).decode("utf-8", "replace")
        finally:
            for descriptor in (source, nothing, output):
                os.close(descriptor)
        return cut_middle(printed, self._output_characters) + how

    def _run(self, handed: list[int]) -> str:
        """Run a program to its end; returns what the policy is told besides its output.

        Raises: `RuntimeError` when it could not be confined.
        """
        try:
            ended = self.runner.run("run", handed, self._timeout_s)
        except RunnerLostError:
            return "error: it ended the process that ran it, and no program can be run any more"
        if ended.failure:
            raise RuntimeError(f"a program could not be confined: {ended.failure}")
        if ended.status is None:
            return f"error: {ended.reason} ({self._timeout_s:g} s)"
        return f"error: exit status {ended.status}" if ended.status else ""
