"""The learner's loop, the only finite one: take groups, step, export the weights, sometimes save.
Its clock is the step; the policy's version is the number of steps taken.

What does not need the learner goes on beside its next step, one version at a time: the generators
load the weights and are proved, the step's slots are released, now and then they are evaluated, and
the step is recorded; then its checkpoint is written, if there is one. A group with a token of a
version still unproved waits for its proof.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from common.errors import NumbersError
from common.record.episodes import episode_metrics
from common.record.metric_names import of_source
from common.supervision.calls import Ref
from common.supervision.faults import reached
from common.trajectory import GroupReceipt
from learner.training.ranks import LearnerRanks
from learner.training.scoring import Scores
from learner.weights.publish import Exported, Publisher


class GroupSource(Protocol):
    """The book of groups, as the learner sees it."""

    async def take(self, version: int, deadline_s: float) -> list[GroupReceipt]:
        """The groups of the next step, for a learner at `version`."""
        ...

    def trained(self, step: int, receipts: list[GroupReceipt]) -> None:
        """Step `step` was made of these groups."""
        ...

    def metrics(self) -> dict[str, float]:
        """What there is to say of groups, trained on or not."""
        ...

    async def release(self) -> None:
        """Every generator holds a step's version: as many groups may go out again."""
        ...


Adapt = Callable[[int, Mapping[str, float]], dict[str, float]]
"""What of the rollout adapts to the metrics of a step; returns metrics of its own."""


Record = Callable[[int, dict[str, float]], None]
"""Takes down a step's metrics."""


class Evaluation(Protocol):
    async def run(self, step: int) -> dict[str, float]: ...


class Scorer(Protocol):
    """A model elsewhere that scores what is trained on."""

    async def score(
        self, receipts: Sequence[GroupReceipt], deadline_s: float
    ) -> list[Ref[Scores]]: ...


class Checkpoints(Protocol):
    async def take(self, step: int) -> None: ...

    async def write(self, step: int) -> None: ...


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
        learner: LearnerRanks,
        publisher: Publisher,
        groups: GroupSource,
        adapt: Adapt,
        evaluation: Evaluation,
        checkpoints: Checkpoints,
        record: Record,
        schedule: Schedule,
        keep_batch: Callable[[list[GroupReceipt]], None],
        stop: asyncio.Event | None = None,
        scorer: Scorer | None = None,
        score_timeout_s: float = 0.0,
    ) -> None:
        """`keep_batch` is given the groups of a step that ended the run by its numbers.

        `stop`, once set, ends the run early: the step under way is finished and saved, and no
        other is begun.

        Args:
            scorer: is asked of the groups before each step; None where nobody is, or the learner
                scores itself.
            score_timeout_s: for one group.
        """
        self._learner = learner
        self._publisher = publisher
        self._groups = groups
        self._adapt = adapt
        self._evaluation = evaluation
        self._checkpoints = checkpoints
        self._record = record
        self._schedule = schedule
        self._keep_batch = keep_batch
        self._stop = stop or asyncio.Event()
        self._scorer = scorer
        self._score_timeout_s = score_timeout_s
        self._delivery: asyncio.Future[dict[str, float]]
        """The generators' half of the last step; done before the first."""
        self._writing: asyncio.Future[None]
        """The last checkpoint on its way to the disk; done before the first."""
        self._saved = schedule.first_step
        """The newest checkpoint's step; that of the untrained model is the model itself."""
        self._stood_still_s = 0.0
        """For a checkpoint, before the step under way."""

    async def run(self) -> dict[str, float]:
        """Steps are numbered from 1; the record of step 0 is the evaluation before training."""
        schedule, trained = self._schedule, self._schedule.first_step
        await self._before_training()
        self._delivery, self._writing = asyncio.Future(), asyncio.Future()
        self._delivery.set_result({})
        self._writing.set_result(None)
        async with asyncio.TaskGroup() as beside:
            for step in range(schedule.first_step + 1, schedule.last_step + 1):
                taking = time.monotonic()
                receipts = await self._take(step - 1)
                if receipts is None:
                    break
                exported, metrics = await self._step(step, receipts, taking)
                self._delivery = beside.create_task(self._deliver(exported, metrics))
                trained = step
                if schedule.checkpoints(step):
                    await self._checkpoint(step, beside)
                if self._stop.is_set():
                    break
            if trained > self._saved:
                await self._checkpoint(trained, beside)
        return await self._delivery

    async def _take(self, version: int) -> list[GroupReceipt] | None:
        """The next step's groups; None when the run is to stop."""
        taking = asyncio.ensure_future(self._groups.take(version, self._schedule.take_timeout_s))
        stopping = asyncio.ensure_future(self._stop.wait())
        try:
            await asyncio.wait((taking, stopping), return_when=asyncio.FIRST_COMPLETED)
            if taking.done() and not self._stop.is_set():
                return taking.result()
        finally:
            taking.cancel()
            stopping.cancel()
            await asyncio.gather(taking, stopping, return_exceptions=True)
        return None

    async def _checkpoint(self, step: int, beside: asyncio.TaskGroup) -> None:
        """Taken now, with the learner at `step`; written beside its next steps."""
        started = time.monotonic()
        await self._writing
        await self._checkpoints.take(step)
        self._writing = beside.create_task(self._write(step, self._delivery))
        self._saved = step
        self._stood_still_s = time.monotonic() - started

    async def _write(self, step: int, delivery: asyncio.Future[dict[str, float]]) -> None:
        """What a resume goes on from was delivered, proved, evaluated and recorded."""
        await delivery
        await self._checkpoints.write(step)

    async def _before_training(self) -> None:
        first = self._schedule.first_step
        metrics = {"policy_version": float(first), "canary/gap": self._publisher.gap}
        if first == 0:
            self._record(0, metrics | await self._evaluation.run(0))

    async def _step(
        self, step: int, receipts: list[GroupReceipt], started: float
    ) -> tuple[Exported, dict[str, float]]:
        """`started`: when the step began to wait for its groups, by `time.monotonic()`."""
        version = step - 1
        stood_still_s, self._stood_still_s = self._stood_still_s, 0.0
        newest = max(receipt.max_version for receipt in receipts)
        await self._publisher.until_proved(newest, self._delivery)
        if self._publisher.shares_devices:
            await self._delivery  # its evaluation too
            await self._publisher.make_room()
        scores, of_scorer = await self._scores(receipts)
        taken = time.monotonic()
        reached("step begins")
        staleness = self._schedule.max_staleness
        try:
            metrics = await self._learner.step(receipts, version, staleness, scores)
        except NumbersError:
            self._keep_batch(receipts)
            raise
        reached("step trained")
        self._groups.trained(step, receipts)
        reached("step in the ledger")
        metrics |= self._groups.metrics() | self._adapt(step, metrics)
        trained = time.monotonic()
        await self._delivery  # of the step before: versions reach the generators one by one
        delivered = time.monotonic()
        exported = await self._publisher.export(step)
        reached("weights exported")
        return exported, metrics | {
            **of_scorer,
            "policy_version": float(step),
            "time/wait_data": taken - started,
            "time/train": trained - taken,
            "time/wait_delivery": delivered - trained,
            "time/checkpoint": stood_still_s,
            "time/step": time.monotonic() - started,
            **_summary(receipts),
        }

    async def _scores(
        self, receipts: list[GroupReceipt]
    ) -> tuple[list[Ref[Scores]] | None, dict[str, float]]:
        """What a scorer elsewhere says of a step's groups, and how long that took."""
        if self._scorer is None:
            return None, {}
        started = time.monotonic()
        scores = await self._scorer.score(receipts, self._score_timeout_s)
        return scores, {"time/wait_scores": time.monotonic() - started}

    async def _deliver(self, exported: Exported, metrics: dict[str, float]) -> dict[str, float]:
        """The generators' half of a step; returns its whole record."""
        step = exported.version
        metrics = metrics | await self._publisher.deliver(exported)
        await self._groups.release()
        if self._schedule.evaluates(step):
            metrics |= await self._evaluation.run(step)
        self._record(step, metrics)
        reached("step on record")
        return metrics


def _summary(receipts: list[GroupReceipt]) -> dict[str, Any]:
    return {
        "tokens/generated": float(sum(receipt.every.tokens for receipt in receipts)),
        **_aside(receipts),
        "completions/unscored": float(sum(receipt.num_unscored for receipt in receipts)),
        "groups/equal_rewards": float(sum(receipt.rewards_equal for receipt in receipts)),
        **_of_each_source(receipts),
        **_suspicious(receipts),
        **episode_metrics([receipt.episodes for receipt in receipts]),
        "time/generate": sum(receipt.generate_s for receipt in receipts) / len(receipts),
    }


def _aside(receipts: list[GroupReceipt]) -> dict[str, float]:
    """What was sampled of the step's groups and is not for the learner, where there is any."""
    found = {
        "completions/drafts": sum(receipt.drafts.completions for receipt in receipts),
        "completions/probes": sum(receipt.probes.completions for receipt in receipts),
        "tokens/drafts": sum(receipt.drafts.tokens for receipt in receipts),
        "tokens/probes": sum(receipt.probes.tokens for receipt in receipts),
    }
    return {name: float(count) for name, count in found.items() if count}


def _of_each_source(receipts: list[GroupReceipt]) -> dict[str, float]:
    """The step's groups counted by data set, where there are several."""
    found: dict[str, float] = {}
    for name in sorted({receipt.source for receipt in receipts} - {""}):
        own = [receipt for receipt in receipts if receipt.source == name]
        scored = [(one.reward_mean, one.num_completions - one.num_unscored) for one in own]
        values = {
            "source/*/reward": _mean(scored),
            "source/*/accuracy": _mean([(one.accuracy_mean, one.num_completions) for one in own]),
            "source/*/groups": float(len(own)),
            "source/*/equal_rewards": float(sum(one.rewards_equal for one in own)),
            "source/*/unscored": float(sum(one.num_unscored for one in own)),
            "source/*/tokens": float(sum(one.every.tokens for one in own)),
        }
        found |= {of_source(metric, name): value for metric, value in values.items()}
    return found


def _mean(weighted: list[tuple[float, int]]) -> float:
    """Mean of what is known, each value with the number of completions behind it."""
    known = [(value, weight) for value, weight in weighted if not math.isnan(value)]
    total = sum(weight for _, weight in known)
    return sum(value * weight for value, weight in known) / total if total else 0.0


def _suspicious(receipts: list[GroupReceipt]) -> dict[str, float]:
    """How many completions touched a wall of the sandbox, in all and by kind; probes are some."""
    of_probes = [kinds for receipt in receipts for kinds in receipt.suspicious_probes]
    others = [kinds for receipt in receipts for kinds in receipt.suspicious]
    each = [kinds.split(",") for kinds in (*others, *of_probes)]
    probed = any(receipt.probes.completions for receipt in receipts)

    def touched(kind: str) -> float:
        return float(sum(kind in kinds for kinds in each))

    return {
        "verdict/suspicious": float(len(each)),
        "verdict/suspicious/files": touched("files"),
        "verdict/suspicious/judge": touched("judge"),
        "verdict/suspicious/kernel": touched("kernel"),
        "verdict/suspicious/network": touched("network"),
        "verdict/suspicious/processes": touched("processes"),
        **({"verdict/suspicious/probes": float(len(of_probes))} if probed else {}),
    }
