"""The learner's loop, the only finite one: take groups, step, publish, release; now and then
evaluate and save. Its clock is the step; the policy's version is the number of steps taken.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Protocol

from common.trajectory import GroupReceipt
from learner.group import LearnerGroup
from learner.publish import Publisher


class GroupSource(Protocol):
    """The generation loop, as the learner sees it."""

    async def take(self, version: int, deadline_s: float) -> list[GroupReceipt]: ...

    def observe(self, step: int, metrics: dict[str, float]) -> dict[str, float]: ...

    async def release(self) -> None: ...


class Evaluation(Protocol):
    async def run(self, step: int) -> dict[str, float]: ...


@dataclass(frozen=True)
class Schedule:
    """Steps at which things happen. 0 for an interval means only first and last."""

    first_step: int
    last_step: int
    eval_every: int
    checkpoint_every: int
    max_staleness: int
    take_timeout_s: float

    def evaluates(self, step: int) -> bool:
        return step == self.last_step or (self.eval_every > 0 and step % self.eval_every == 0)

    def checkpoints(self, step: int) -> bool:
        every = self.checkpoint_every
        return step == self.last_step or (every > 0 and step % every == 0)


class LearnerLoop:
    """Runs from `first_step` to `last_step` and returns the last step's metrics."""

    def __init__(
        self,
        *,
        learner: LearnerGroup,
        publisher: Publisher,
        groups: GroupSource,
        evaluation: Evaluation,
        save: Callable[[int], Awaitable[None]],
        record: Callable[[int, dict[str, float]], None],
        schedule: Schedule,
    ) -> None:
        self._learner = learner
        self._publisher = publisher
        self._groups = groups
        self._evaluation = evaluation
        self._save = save
        self._record = record
        self._schedule = schedule

    async def run(self) -> dict[str, float]:
        """Steps are numbered from 1; the record of step 0 is the evaluation before training."""
        schedule = self._schedule
        metrics: dict[str, float] = {}
        if schedule.first_step == 0:
            metrics = await self._before_training()
        for step in range(schedule.first_step + 1, schedule.last_step + 1):
            metrics = await self._step(step)
            if schedule.evaluates(step):
                metrics |= await self._evaluation.run(step)
            self._record(step, metrics)
            if schedule.checkpoints(step):
                await self._save(step)
        return metrics

    async def _before_training(self) -> dict[str, float]:
        metrics = {"policy_version": 0.0, "canary/gap": await self._publisher.prove(0)}
        metrics |= await self._evaluation.run(0)
        self._record(0, metrics)
        return metrics

    async def _step(self, step: int) -> dict[str, float]:
        schedule, version = self._schedule, step - 1
        started = time.monotonic()
        receipts = await self._groups.take(version, schedule.take_timeout_s)
        taken = time.monotonic()
        metrics = await self._learner.step(receipts, version, schedule.max_staleness)
        trained = time.monotonic()
        metrics |= await self._publisher.publish(step)
        metrics |= self._groups.observe(step, metrics)
        await self._groups.release()
        return metrics | {
            "policy_version": float(step),
            "time/wait_data": taken - started,
            "time/train": trained - taken,
            "time/step": time.monotonic() - started,
            **_summary(receipts),
        }


def _summary(receipts: list[GroupReceipt]) -> dict[str, Any]:
    return {
        "tokens/generated": float(sum(receipt.num_tokens for receipt in receipts)),
        "completions/unscored": float(sum(receipt.num_unscored for receipt in receipts)),
        "groups/equal_rewards": float(sum(receipt.rewards_equal for receipt in receipts)),
        "time/generate": sum(receipt.generate_s for receipt in receipts) / len(receipts),
    }
