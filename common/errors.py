"""The errors a person may meet.

Each message says what happened, with the values at fault, and what to do about it.
The command line prints `UserError` and `RunError` without a traceback and ends with their
`exit_code`. Anything else is a defect of ours and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence


class UserError(Exception):
    """Wrong input: configuration, data, model folder, address. Exit status 2."""

    exit_code = 2


class RunError(Exception):
    """A run that cannot go on, with its cause. Exit status 1."""

    exit_code = 1


class StallError(RunError):
    """A wait passed its deadline: who waited for whom, for what, and for how long."""


class StartError(RunError):
    """Ray did not come up, as happens on a machine with too much to do; it may the next time."""


class WeightsError(RunError):
    """The generators do not hold the learner's weights (canary, checksum or coverage)."""


class RefutedError(WeightsError):
    """A generator scored the canary as it should not: it computes with other weights."""


class NumbersError(RunError):
    """A gradient that is not finite: nothing to train on."""


class VerifierError(RunError):
    """A verifier gave something that is not a reward; the message names the verifier."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message; its representation where it has none."""
    return (str(error).strip() or repr(error)).splitlines()[0]


def nearest(word: str, known: Sequence[str]) -> str:
    """A hint for an error, with a space before it; empty where nothing is near."""
    lowered = {name.lower(): name for name in known}
    match = difflib.get_close_matches(word.lower(), lowered, n=1, cutoff=0.6)
    return f" (did you mean {lowered[match[0]]}?)" if match else ""
