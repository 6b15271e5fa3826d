"""Going on by itself after a lost process: from the last checkpoint, a few times, then no more.

Whatever process dies or hangs, the answer is the same: end all, start again, resume.
The ledger and the trajectory log make that cheap: what was verified is trained on, not sampled
again, and only the learner's steps since the checkpoint are repeated.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from ray.exceptions import NodeDiedError, ObjectLostError, RayActorError, WorkerCrashedError

from common.config.sections import RestartConfig
from common.errors import (
    RefutedError,
    RunError,
    StallError,
    StartError,
    WeightsError,
    first_line,
)

_LOST = (RayActorError, ObjectLostError, NodeDiedError, WorkerCrashedError)
"""Ray's words for a process that is gone."""


def is_recoverable(error: BaseException) -> bool:
    """Whether starting again may help: a process died, hangs or did not start, or weights got lost.

    Wrong input and bad numbers would be the same again.
    """
    return isinstance(error, (*_LOST, StallError, StartError, WeightsError))


class RestartBudget:
    """Counts restarts in a sliding window, and those in a row that brought the run no further.

    The second count is for what fails slowly: with a deadline of ten minutes at each start, no
    window of half an hour ever holds four failures. Weights that are refuted twice with the same
    numbers were not lost on the way: no restart brings others.
    """

    def __init__(self, config: RestartConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self._config = config
        self._clock = clock
        self._causes: list[tuple[float, str]] = []
        self._furthest = -1
        self._in_vain = 0

    def after(
        self, error: BaseException, step: int | None = None, go_on: str = "go on by resume="
    ) -> float:
        """Seconds to wait before the restart that answers `error`.

        Args:
            step: the last one on record, where everything starts again.
            go_on: what a person does once the cause is mended.

        Raises:
            RunError: there were too many; all their causes are in the message.
        """
        now = self._clock()
        cause = _cause(error)
        if isinstance(error, RefutedError) and cause in (why for _, why in self._causes):
            raise RunError(
                f"refuted twice with the same numbers, which no restart changes:\n  {cause}\n"
                f"Mend the cause and {go_on}"
            ) from error
        self._causes = [(at, why) for at, why in self._causes if now - at < self._config.window_s]
        self._causes.append((now, cause))
        restarts = len(self._causes)
        if restarts > self._config.limit:
            listed = "\n".join(f"  {now - at:.0f} s ago: {why}" for at, why in self._causes)
            raise RunError(
                f"{restarts} failures within {self._config.window_s:.0f} s, more than "
                f"restart.limit={self._config.limit}:\n{listed}\nMend the cause and {go_on}"
            ) from error
        if step is not None:
            self._in_vain = 1 if step > self._furthest else self._in_vain + 1
            self._furthest = max(self._furthest, step)
            if self._in_vain > self._config.limit:
                raise RunError(
                    f"{self._in_vain} failures in a row without one step more than "
                    f"{self._furthest}, more than restart.limit={self._config.limit}; the last:\n"
                    f"  {cause}\nMend the cause and {go_on}"
                ) from error
        return float(self._config.backoff_s * 2 ** (restarts - 1))


def wanted_of_lost(error: BaseException) -> list[str]:
    """Who waited for what of a process that is gone: Ray names its class and number alone."""
    return list(getattr(error, "__notes__", [])) if isinstance(error, _LOST) else []


def _cause(error: BaseException) -> str:
    wanted = "".join(f" ({note})" for note in wanted_of_lost(error)[:1])
    return f"{type(error).__name__}: {first_line(error)}{wanted}"
