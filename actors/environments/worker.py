"""The verifier actor: a rollout batch in, a trajectory batch out.

`VerifierWorker` owns one environment, and the one thread that talks to it. So the actor's event
loop stays free while a group is judged. Groups sent at the same time wait for each other.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import pyarrow as pa

from actors.environments.base import Environment, Step
from actors.environments.single_turn import SingleTurn
from actors.verifiers.registry import verifier_names
from common.config.sections import VerifierConfig
from common.record.schema import (
    ERROR,
    TIMEOUT,
    rollout_schema,
    trajectory_schema,
)
from common.supervision.faults import reached
from common.supervision.stacks import arm

T = TypeVar("T")

_REASONS_KEPT = 100


class VerifierWorker:
    """Judges groups, one after the other, in a child process.

    The constructor starts the child and does not wait for it; `warm_up` does.
    """

    def __init__(self, config: VerifierConfig) -> None:
        self._names = verifier_names(config)
        self._environment: Environment = SingleTurn(config)
        self._failures: Counter[str] = Counter()
        # One thread: an environment takes one caller, and groups queue for it in order.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="verifier")

    async def warm_up(self) -> None:
        """Return when the environment can play. Raises: as `Environment.wait_ready`."""
        arm()
        await self._run(self._environment.wait_ready)

    async def score_group(self, batch: pa.RecordBatch) -> tuple[pa.RecordBatch, int]:
        """The batch in `trajectory_schema`: a reward and a verdict a rule, then the totals.

        `reward` is the weighted sum, null where any rule gave `error` or `timeout`. `accuracy` is
        the first rule's reward, null where that rule gave either. It takes at most G * R *
        (timeout_s + a restart of the child), for G completions and R rules.

        Returns:
            (the batch, its number of completions: an acknowledgement small enough to fetch).

        Raises:
            ValueError: it is no rollout batch. Others as `warm_up`.
        """
        if not batch.schema.equals(rollout_schema()):
            raise ValueError(f"not a rollout batch: {batch.schema.names}")
        steps = await self._run(lambda: self._played(batch))
        self._count_failures(steps)
        reached("verdict given")
        return with_verdicts(batch, self._names, steps), batch.num_rows

    def _played(self, batch: pa.RecordBatch) -> list[Step]:
        """The ends of episodes whose one reply is given."""
        tasks, prompts, replies, finish_reasons = (
            batch.column(name).to_pylist()
            for name in ("reference", "prompt_text", "text", "finish_reason")
        )
        self._environment.reset(tasks, prompts)
        steps = self._environment.step(replies, finish_reasons)
        if not all(step.done for step in steps):
            raise NotImplementedError("an episode wants a second turn, and nobody can play it yet")
        return steps

    def failures(self) -> dict[str, int]:
        """Why rules could not judge, and how often; the first hundred distinct reasons."""
        return dict(self._failures)

    async def ping(self) -> None:
        """A sign of life."""

    def close(self) -> None:
        """End the environment; a group being judged fails with `RunError`."""
        self._environment.close()
        self._thread.shutdown(wait=True, cancel_futures=True)

    async def _run(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def _count_failures(self, steps: Sequence[Step]) -> None:
        for verdict in (verdict for step in steps for verdict in step.verdicts):
            if verdict.kind in (ERROR, TIMEOUT):
                known = verdict.reason in self._failures or len(self._failures) < _REASONS_KEPT
                self._failures[verdict.reason if known else "other reasons"] += 1


def with_verdicts(
    batch: pa.RecordBatch, names: Sequence[str], steps: Sequence[Step]
) -> pa.RecordBatch:
    """`batch`, and columns for what its episodes ended with: a step a row, a verdict a name."""
    columns = list(batch.columns)
    for rule in range(len(names)):
        verdicts = [step.verdicts[rule] for step in steps]
        columns.append(pa.array([verdict.reward for verdict in verdicts], pa.float32()))
        columns.append(pa.array([verdict.kind for verdict in verdicts], pa.string()))
    columns.append(pa.array([step.reward for step in steps], pa.float32()))
    columns.append(pa.array([step.verdicts[0].reward for step in steps], pa.float32()))
    columns.append(pa.array([_suspicious(step) for step in steps], pa.string()))
    return pa.RecordBatch.from_arrays(columns, schema=trajectory_schema(names))


def _suspicious(step: Step) -> str:
    """The walls that a reply touched before any of its rules."""
    kinds = {kind for verdict in step.verdicts for kind in verdict.suspicious.split(",")}
    return ",".join(sorted(kinds - {""}))
