"""The loop of an evaluation: every sample that is not in the log yet, each a group of one.

Samples go through generators, verifiers and trajectory log as groups of training do. A sample is
logged as soon as it has its verdict, so what is interrupted goes on with the samples that are
missing. Sample s of problem p has the number p * k + s, which is its group's id.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from actors.data.prompts import Prompt
from actors.rollout.episodes import Episodes, GroupSampling
from actors.rollout.guidance import UNGUIDED, GuidedStart
from common.record.trajectory_log import read_log
from common.record.writer import TrajectoryLogClient
from common.trajectory import Begun, GroupRequest, ticket_seed
from deploy.eval.settings import Sampling

Start = GuidedStart | Begun
"""What samples go on from: the first tokens of an answer, or the beginning of an episode."""


def logged(folder: Path) -> set[int]:
    """Numbers of the samples that a trajectory log holds."""
    return {batch.column("group_id")[0].as_py() for batch in read_log(folder)}


def logged_rewards(folder: Path) -> dict[int, float | None]:
    """The reward of every sample that a trajectory log holds, by its number; None without one."""
    return {
        batch.column("group_id")[0].as_py(): batch.column("reward")[0].as_py()
        for batch in read_log(folder)
    }


def sample_seed(seed: int, problem: int, sample: int) -> int:
    """The seed of one sample: the same in every call, whatever else is asked and in what order.

    Synchronous training seeds completion `sample` of ticket `problem` so.
    """
    return ticket_seed(seed, problem) + sample


class SuiteRunner:
    """Samples one suite."""

    def __init__(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        *,
        episodes: Episodes,
        log: TrajectoryLogClient,
        in_flight: int,
        progress: Callable[[int], None],
        starts: Sequence[Start] = (),
        seconds: float = math.inf,
    ) -> None:
        """Nothing is sampled yet.

        Args:
            in_flight: the most samples under way at a time.
            progress: is told how many samples have been logged, after each.
            starts: what every sample of a problem goes on from; nothing: from its prompt.
            seconds: after which no further sample is begun.
        """
        self._prompts = prompts
        self._sampling = sampling
        self._episodes = episodes
        self._log = log
        self._slots = asyncio.Semaphore(in_flight)
        self._progress = progress
        self._starts = starts
        self._seconds = seconds
        self._done = 0

    async def run(self, numbers: Iterable[int]) -> None:
        """Sample, judge and log each, until the time is over; the first error of one ends all.

        Raises: `ExceptionGroup` of what the parts raise, `StallError` at a deadline among it.
        """
        ends = time.monotonic() + self._seconds
        async with asyncio.TaskGroup() as tasks:
            for number in numbers:
                await self._slots.acquire()
                if time.monotonic() >= ends:
                    break
                tasks.create_task(self._one(self._request(number)))

    async def _one(self, request: GroupRequest) -> None:
        try:
            judged = await self._episodes.run(request)
            await self._log.append(request.group_id, judged)
            self._done += 1
            self._progress(self._done)
        finally:
            self._slots.release()

    def _request(self, number: int) -> GroupRequest:
        sampling = self._sampling
        problem, sample = divmod(number, sampling.samples)
        start: Start = self._starts[problem] if self._starts else UNGUIDED
        begun = start if isinstance(start, Begun) else None
        return self._episodes.request(
            self._prompts[problem],
            GroupSampling(1, sampling.max_tokens, sampling.temperature),
            group_id=number,
            guided=start if isinstance(start, GuidedStart) else UNGUIDED,
            begun=begun,
            seed=sample_seed(sampling.seed, problem, sample),
        )
