"""The loop of an evaluation: every sample that is not in the log yet, each a group of one.

Samples go through generators, verifiers and trajectory log as groups of training do. A sample is
logged as soon as it has its verdict, so what is interrupted goes on with the samples that are
missing. Sample s of problem p has the number p * k + s, which is its group's id.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from actors.data.prompts import Prompt
from actors.rollout.pools import GeneratorPool, GroupLostError, VerifierPool
from common.config.sections import Config
from common.record.trajectory_log import read_log
from common.record.writer import TrajectoryLogClient
from common.trajectory import GroupRequest, ticket_seed
from deploy.eval.settings import Sampling, in_flight


def logged(folder: Path) -> set[int]:
    """Numbers of the samples that a trajectory log holds."""
    return {batch.column("group_id")[0].as_py() for batch in read_log(folder)}


def sample_seed(seed: int, problem: int, sample: int) -> int:
    """As synchronous training seeds completion `sample` of ticket `problem`: the same in every
    call, whatever else is asked and in whatever order."""
    return ticket_seed(seed, problem) + sample


class SuiteRunner:
    """Samples one suite."""

    def __init__(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        *,
        generators: GeneratorPool,
        verifiers: VerifierPool,
        log: TrajectoryLogClient,
        config: Config,
        progress: Callable[[int], None],
    ) -> None:
        """`progress` is told how many samples have been logged, after each."""
        self._prompts = prompts
        self._sampling = sampling
        self._generators = generators
        self._verifiers = verifiers
        self._log = log
        self._generate_s = config.generator.group_timeout_s
        self._verify_s = config.verify_timeout_s
        self._slots = asyncio.Semaphore(in_flight(config))
        self._progress = progress
        self._done = 0

    async def run(self, numbers: Iterable[int]) -> None:
        """Sample, judge and log each; the first error of one ends all.

        Raises: `ExceptionGroup` of what the parts raise, `StallError` at a deadline among it.
        """
        async with asyncio.TaskGroup() as tasks:
            for number in numbers:
                await self._slots.acquire()
                tasks.create_task(self._one(self._request(number)))

    async def _one(self, request: GroupRequest) -> None:
        try:
            verified = await self._verified(request)
            await self._log.append(request.group_id, [verified])
            self._done += 1
            self._progress(self._done)
        finally:
            self._slots.release()

    async def _verified(self, request: GroupRequest) -> object:
        """What dies with its generator is sampled again, under the same seed."""
        while True:
            try:
                rollouts = self._generators.generate(request, self._generate_s)
                (rollout,) = [ref async for ref in rollouts]  # one completion, one batch
                verified: object = await self._verifiers.score(
                    request.group_id, rollout, self._verify_s
                )
                return verified
            except GroupLostError:
                continue

    def _request(self, number: int) -> GroupRequest:
        problem, sample = divmod(number, self._sampling.samples)
        prompt = self._prompts[problem]
        return GroupRequest(
            group_id=number,
            ticket=-1,
            prompt_id=prompt.prompt_id,
            epoch=prompt.epoch,
            prompt_text=prompt.text,
            prompt_ids=prompt.token_ids,
            reference=prompt.reference,
            num_completions=1,
            max_tokens=self._sampling.max_tokens,
            temperature=self._sampling.temperature,
            dispatch_version=self._generators.version,
            dispatched_s=time.time(),
            seed=sample_seed(self._sampling.seed, problem, sample),
        )
