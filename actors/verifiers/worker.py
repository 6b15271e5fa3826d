"""The verifier actor: a rollout batch in, a trajectory batch out.

`VerifierWorker` owns one `Sandbox` and the one thread that talks to it, so the actor's event loop
stays free while a group is judged; groups sent at the same time wait their turn.
G completions a group, R rules.
"""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import pyarrow as pa

from actors.sandbox.sandbox import RuleSpec, Sandbox, Task
from actors.verifiers.base import Verdict, fits_float32
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

__all__ = ["VerifierWorker", "verifier_names", "with_verdicts"]

T = TypeVar("T")

_REASONS_KEPT = 100


class VerifierWorker:
    """Judges groups, one after the other, in a child process.

    The constructor starts the child and does not wait for it; `warm_up` does.
    """

    def __init__(self, config: VerifierConfig) -> None:
        self._names = verifier_names(config)
        self._weights = [rule.weight for rule in config.rules]
        self._failures: Counter[str] = Counter()
        specs = [
            RuleSpec(name, rule.name, dict(rule.args))
            for name, rule in zip(self._names, config.rules, strict=True)
        ]
        self._sandbox = Sandbox(specs, config.timeout_s, network=config.network)
        # One thread: the sandbox takes one caller, and groups queue for it in order.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="verifier")

    async def warm_up(self) -> None:
        """Return when the child has imported its rules.

        Raises: `UserError` for a rule that cannot be used; `VerifierError` when it does not start.
        """
        arm()
        await self._run(self._sandbox.wait_ready)

    async def score_group(self, batch: pa.RecordBatch) -> tuple[pa.RecordBatch, int]:
        """The batch in `trajectory_schema`: a reward and a verdict a rule, then the totals.

        The count of its completions comes beside it as an acknowledgement small enough to fetch.
        `reward` is the weighted sum, null where any rule gave `error` or `timeout`; `accuracy` is
        the first rule's reward, null where that rule gave either. Takes at most
        G * R * (timeout_s + a restart of the child).
        Raises: as `warm_up`; `ValueError` when `batch` is no rollout batch.
        """
        if not batch.schema.equals(rollout_schema()):
            raise ValueError(f"not a rollout batch: {batch.schema.names}")
        tasks = [
            Task(rule, text, reference)
            for text, reference in zip(
                batch.column("text").to_pylist(), batch.column("reference").to_pylist(), strict=True
            )
            for rule in range(len(self._names))
        ]
        verdicts = await self._run(lambda: self._sandbox.score(tasks))
        self._count_failures(verdicts)
        reached("verdict given")
        return with_verdicts(batch, self._names, self._weights, verdicts), batch.num_rows

    def failures(self) -> dict[str, int]:
        """Why rules could not judge, and how often; the first hundred distinct reasons."""
        return dict(self._failures)

    async def ping(self) -> None:
        """A sign of life."""

    def close(self) -> None:
        """End the child process; a group being judged fails with `RunError`."""
        self._sandbox.close()
        self._thread.shutdown(wait=True, cancel_futures=True)

    async def _run(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def _count_failures(self, verdicts: Sequence[Verdict]) -> None:
        for verdict in verdicts:
            if verdict.kind in (ERROR, TIMEOUT):
                known = verdict.reason in self._failures or len(self._failures) < _REASONS_KEPT
                self._failures[verdict.reason if known else "other reasons"] += 1


def with_verdicts(
    batch: pa.RecordBatch,
    names: Sequence[str],
    weights: Sequence[float],
    verdicts: Sequence[Verdict],
) -> pa.RecordBatch:
    """`batch` and the columns its G * R verdicts (rule index fastest) make."""
    rules = range(len(names))
    rewards_RG = [[v.reward for v in verdicts[rule :: len(names)]] for rule in rules]
    columns = list(batch.columns)
    for rule in rules:
        columns.append(pa.array(rewards_RG[rule], pa.float32()))
        columns.append(pa.array([v.kind for v in verdicts[rule :: len(names)]], pa.string()))
    totals = [_weighted_sum(rewards, weights) for rewards in zip(*rewards_RG, strict=True)]
    columns.append(pa.array(totals, pa.float32()))
    columns.append(pa.array(rewards_RG[0], pa.float32()))
    return pa.RecordBatch.from_arrays(columns, schema=trajectory_schema(names))


def _weighted_sum(rewards: Sequence[float | None], weights: Sequence[float]) -> float | None:
    known = [reward for reward in rewards if reward is not None]
    if len(known) < len(rewards):
        return None
    total = math.fsum(w * r for w, r in zip(weights, known, strict=True))
    return total if fits_float32(total) else None
