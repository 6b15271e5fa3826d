"""The verifier actor: a rollout batch in, a trajectory batch out.

`VerifierWorker` owns one judge, and the one thread that talks to it. So the actor's event loop
stays free while a group is judged. Groups sent at the same time wait for each other.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import pyarrow as pa

from actors.sandbox.verdict import Verdict
from actors.sandbox.walls import find_walls
from actors.verifiers.judge import Judge, Judgement, Played
from actors.verifiers.registry import verifier_names
from common.config.sections import VerifierConfig
from common.record.schema import (
    ERROR,
    SKIPPED,
    TIMEOUT,
    rollout_schema,
    trajectory_schema,
)
from common.supervision.faults import reached
from common.supervision.stacks import arm

T = TypeVar("T")

_REASONS_KEPT = 100
_SAID = ("verdict", "reason", "reward")
_LONGEST_FEEDBACK = 10_000
"""Characters."""


class VerifierWorker:
    """Judges groups, one after the other, in a child process.

    The constructor starts the child and does not wait for it; `warm_up` does.
    """

    def __init__(self, config: VerifierConfig) -> None:
        self._names = verifier_names(config)
        self._judge = Judge(config)
        self._failures: Counter[str] = Counter()
        # One thread: a judge takes one caller, and groups queue for it in order.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="verifier")

    async def warm_up(self) -> list[str]:
        """Return when the judge is ready, with a line for each wall around it on this node.

        Raises: as `Judge.wait_ready`. A rule that runs programs is no good where a program could
        reach its judge, unless `verifier.sandbox` is `trusted`.
        """
        arm()
        await self._run(self._judge.wait_ready)
        return find_walls().describe()

    async def score_group(self, batch: pa.RecordBatch) -> tuple[pa.RecordBatch, int]:
        """The batch in `trajectory_schema`: a reward and a verdict a rule, then the totals.

        `reward` is the weighted sum, null where any rule gave `error` or `timeout`. `accuracy` is
        the reward of the first rule that judges the data set, null where that rule gave either. It
        takes at most G * R * (timeout_s + a restart of the child), for G completions and R rules.

        Returns:
            (the batch, its number of completions: an acknowledgement small enough to fetch).

        Raises:
            ValueError: it is no rollout batch. Others as `warm_up`.
        """
        if not batch.schema.equals(rollout_schema()):
            raise ValueError(f"not a rollout batch: {batch.schema.names}")
        judged = await self._run(lambda: self._judged(batch))
        self._count_failures(judged)
        reached("verdict given")
        return with_verdicts(batch, self._names, judged), batch.num_rows

    def _judged(self, batch: pa.RecordBatch) -> list[Judgement]:
        texts, references, finish_reasons, prompts = (
            batch.column(name).to_pylist()
            for name in ("text", "reference", "finish_reason", "prompt_text")
        )
        said = (batch.column(f"environment_{name}").to_pylist() for name in _SAID)
        played = [Played(*one) for one in zip(*said, strict=True)]
        return self._judge.judge(texts, references, finish_reasons, prompts, played)

    def failures(self) -> dict[str, int]:
        """Why rules could not judge, and how often; the first hundred distinct reasons."""
        return dict(self._failures)

    async def ping(self) -> None:
        """A sign of life."""

    def close(self) -> None:
        """End the judge; a group being judged fails with `RunError`."""
        self._judge.close()
        self._thread.shutdown(wait=True, cancel_futures=True)

    async def _run(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def _count_failures(self, judged: Sequence[Judgement]) -> None:
        for verdict in (verdict for each in judged for verdict in each.verdicts):
            if verdict.kind in (ERROR, TIMEOUT):
                known = verdict.reason in self._failures or len(self._failures) < _REASONS_KEPT
                self._failures[verdict.reason if known else "other reasons"] += 1


def with_verdicts(
    batch: pa.RecordBatch, names: Sequence[str], judged: Sequence[Judgement]
) -> pa.RecordBatch:
    """`batch`, and columns for what was said of it: a judgement a row, a verdict a name."""
    columns = list(batch.columns)
    said = [_feedback(each) for each in judged]
    columns[batch.schema.get_field_index("feedback")] = pa.array(said, pa.string())
    for rule in range(len(names)):
        verdicts = [each.verdicts[rule] for each in judged]
        columns.append(pa.array([verdict.reward for verdict in verdicts], pa.float32()))
        columns.append(pa.array([verdict.kind for verdict in verdicts], pa.string()))
    columns.append(pa.array([each.reward for each in judged], pa.float32()))
    columns.append(pa.array([_first(each).reward for each in judged], pa.float32()))
    columns.append(pa.array([_suspicious(each) for each in judged], pa.string()))
    return pa.RecordBatch.from_arrays(columns, schema=trajectory_schema(names))


def _first(judged: Judgement) -> Verdict:
    """The verdict of the first rule that was asked."""
    return next(verdict for verdict in judged.verdicts if verdict.kind != SKIPPED)


def _feedback(judged: Judgement) -> str:
    """What all rules say that a completion lacks, one behind the other."""
    said = "\n".join(verdict.feedback for verdict in judged.verdicts if verdict.feedback)
    # Half of a surrogate pair, which JSON can spell, is no text that Arrow takes.
    return said[:_LONGEST_FEEDBACK].encode("utf-8", "replace").decode()


def _suspicious(judged: Judgement) -> str:
    """The walls that a completion touched before any of its rules."""
    kinds = {kind for verdict in judged.verdicts for kind in verdict.suspicious.split(",")}
    return ",".join(sorted(kinds - {""}))
