"""The trajectory log's actor: verified groups go in, receipts come out.

It is an actor of its own, so that the coordinator never touches tokens. A batch stays where it is
in Ray's object store. The writer maps it, checks it, appends it to the log, and returns a receipt.

    TrajectoryLogWriter    the actor, which owns the files (`common.record.trajectory_log`)
    TrajectoryLogClient    the coordinator's side of it
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet
from ray.exceptions import RayActorError

from common.errors import StallError
from common.record.episodes import episode_sums
from common.record.metric_names import of_source
from common.record.parts import (
    drafts,
    folded,
    last_probe_s,
    learnt,
    newest_probe,
    probes,
    suspicious_probes,
)
from common.record.schema import SUSPICIOUS, trajectory_schema
from common.record.segments import check_segments
from common.record.trajectory_log import TrajectoryLog, read_segment, segments
from common.record.turns import check_turns, compared, sampled_lengths, trained_lengths
from common.supervision.calls import Call, Handle, Ref, ask, call, get_all, in_group, put, resolved
from common.supervision.faults import reached
from common.supervision.heartbeat import HEALTH
from common.supervision.replacement import Replacement, is_own_death
from common.supervision.stacks import arm
from common.supervision.waits import Waits
from common.trajectory import GroupReceipt

_RECOVER_S = 600.0
_FETCH_S = 60.0

R = TypeVar("R")

Logged = Callable[[Sequence[GroupReceipt]], None]
"""Is told of groups that are in the log."""


class TrajectoryLogWriter:
    """Owns the trajectory log of a run directory."""

    def __init__(self, run_folder: str, verifiers: list[str]) -> None:
        arm()
        self._schema = trajectory_schema(verifiers)
        self._run_folder = Path(run_folder)
        self._log = TrajectoryLog(self._run_folder / "trajectories", self._schema)

    def append(self, sizes: list[int], *batches: pa.RecordBatch) -> list[GroupReceipt]:
        """Log verified groups, the first of `sizes[0]` batches, the next of `sizes[1]`, and so on.

        The batches are arguments of their own, not a list of references. So Ray resolves them,
        three times as fast as a `get` in here, which has to ask their owner.

        Returns:
            A receipt for each group. Its `batch_ref` is a batch that joins the group's, or None
            where the group was a single batch, to which the caller has the reference.

        Raises:
            ValueError: a batch does not have the run's schema, or turns that are not its sampled
                tokens, or segments that are not its tokens.
            OSError: the log cannot be written.
        """
        for batch in batches:
            if not batch.schema.equals(self._schema, check_metadata=False):
                raise ValueError(f"group has schema {batch.schema}, the log has {self._schema}")
            check_turns(batch)
            check_segments(batch)
        groups = iter(batches)
        receipts = [self._append_one(list(itertools.islice(groups, size))) for size in sizes]
        reached("log appended")
        return receipts

    def _append_one(self, parts: list[pa.RecordBatch]) -> GroupReceipt:
        group, ref = parts[0], None
        if len(parts) > 1:
            group = folded(pa.concat_batches(parts).sort_by("completion_index"))
            ref = put(group)
        self._log.append(group)
        return receipt(group, ref)

    def recover(self, group_ids: list[int]) -> list[GroupReceipt]:
        """Find groups that an earlier process of the run has logged; their receipts.

        Groups of another schema (other verifiers) are left out.
        """
        wanted, found = set(group_ids), []
        for path in reversed(segments(self._run_folder / "trajectories")):
            if not wanted:
                break
            for batch in read_segment(path):
                group_id = batch.column("group_id")[0].as_py()
                if group_id in wanted and batch.schema.equals(self._schema, check_metadata=False):
                    wanted.discard(group_id)
                    found.append(receipt(batch, put(batch)))
        return found

    def write_evaluation(self, step: int, refs: list[Ref[pa.RecordBatch]]) -> dict[str, float]:
        """Keep the held-out completions of one evaluation as `evaluations/step-N.parquet`.

        Returns:
            Its metrics. Completions without a verdict count as wrong in `eval/accuracy`.
        """
        folder = self._run_folder / "evaluations"
        folder.mkdir(exist_ok=True)
        table = pa.Table.from_batches(get_all(refs, _FETCH_S), schema=self._schema)
        pa.parquet.write_table(table, folder / f"step-{step:06d}.parquet", compression="zstd")
        accuracy_B = table.column("accuracy").to_numpy()
        lengths = pc.list_value_length(table.column("token_ids"))
        return {
            "eval/accuracy": _share_right(accuracy_B),
            "eval/unscored": float(np.isnan(accuracy_B).sum()),
            "eval/length": float(pc.mean(lengths).as_py()),
            **_of_each_source(table.column("source").to_pylist(), accuracy_B),
        }

    @in_group(HEALTH)
    def ping(self) -> None:
        """A sign of life."""

    def close(self) -> None:
        """Close the open segment."""
        self._log.close()


def _share_right(accuracy: npt.NDArray[np.floating]) -> float:
    """Mean accuracy; what has no verdict counts as wrong."""
    return float(np.nansum(accuracy)) / len(accuracy)


def _of_each_source(source_B: list[str], accuracy_B: npt.NDArray[np.floating]) -> dict[str, float]:
    """The metrics of an evaluation for each of several data sets."""
    found: dict[str, float] = {}
    for name in sorted(set(source_B) - {""}):
        own = accuracy_B[np.array([source == name for source in source_B])]
        found[of_source("source/*/eval_accuracy", name)] = _share_right(own)
        found[of_source("source/*/eval_unscored", name)] = float(np.isnan(own).sum())
    return found


def receipt(batch: pa.RecordBatch, ref: Ref[pa.RecordBatch] | None) -> GroupReceipt:
    """Sum a verified group up for the control plane.

    Args:
        batch: the group as it is logged.
        ref: a reference to it.
    """
    drafted, probed, probed_by = drafts(batch), probes(batch), newest_probe(batch)
    suspicious = tuple(kinds for kinds in batch.column(SUSPICIOUS).to_pylist() if kinds)
    touched_by_probes = suspicious_probes(batch)
    ended_s = max(pc.max(batch.column("finished_s")).as_py(), last_probe_s(batch))
    batch = learnt(batch)
    lengths_G = sampled_lengths(batch)
    rewards_G = batch.column("reward").to_numpy(zero_copy_only=False).astype(np.float64)
    scored = rewards_G[~np.isnan(rewards_G)]
    accuracy_G = batch.column("accuracy").to_numpy(zero_copy_only=False).astype(np.float64)
    judged = accuracy_G[~np.isnan(accuracy_G)]
    compared_G = ~np.isnan(rewards_G) & compared(lengths_G, trained_lengths(batch))
    versions = batch.column("weight_versions").flatten()
    dispatch_version = batch.column("dispatch_version")[0].as_py()
    newest = pc.max(versions).as_py() if len(versions) else dispatch_version
    dispatched_s = batch.column("dispatched_s")[0].as_py()
    return GroupReceipt(
        group_id=batch.column("group_id")[0].as_py(),
        ticket=batch.column("ticket")[0].as_py(),
        batch_ref=ref,
        dispatch_version=dispatch_version,
        min_version=pc.min(versions).as_py() if len(versions) else dispatch_version,
        max_version=max(newest, probed_by),
        num_completions=batch.num_rows,
        num_tokens=int(lengths_G.sum()),
        reward_mean=float(scored.mean()) if scored.size else float("nan"),
        rewards_equal=bool(scored.size == 0 or scored.min() == scored.max()),
        num_unscored=int(np.isnan(rewards_G).sum()),
        unscored_tokens=int(lengths_G[np.isnan(rewards_G)].sum()),
        num_compared=int(compared_G.sum()),
        compared_tokens=int(lengths_G[compared_G].sum()),
        episodes=episode_sums(batch),
        suspicious=suspicious,
        generate_s=max(0.0, ended_s - dispatched_s),  # clocks may be set back
        accuracy_mean=float(judged.mean()) if judged.size else float("nan"),
        source=batch.column("source")[0].as_py(),
        drafts=drafted,
        probes=probed,
        suspicious_probes=touched_by_probes,
    )


class TrajectoryLogClient:
    """The coordinator's side of the trajectory log: one call at a time, with all that is ready.

    A call of Ray costs more than writing a group. So groups that end while a call is under way go
    together in the next. With a `replacement`, a writer that dies is replaced, and what it had
    written is not written again.
    """

    def __init__(
        self,
        writer: Handle[TrajectoryLogWriter],
        waits: Waits,
        deadline_s: float,
        replacement: Replacement[TrajectoryLogWriter] | None = None,
    ) -> None:
        self.writer = writer
        self._waits = waits
        self._deadline_s = deadline_s
        self._replacement = replacement
        self._ready: list[_Unlogged] = []
        self._calling = asyncio.Lock()
        self._replacing = asyncio.Lock()

    async def append(
        self, group_id: int, refs: list[Ref[pa.RecordBatch]], logged: Logged = lambda receipts: None
    ) -> GroupReceipt:
        """Log a verified group, in one batch or several, and return once it is written.

        Args:
            logged: is told of all groups that went in one call, before any `append` of them
                returns. It is the same for every group.

        Raises:
            StallError: the deadline passed.
        """
        group = _Unlogged(group_id, refs)
        self._ready.append(group)
        async with self._calling:
            if group in self._ready:
                sent, self._ready = self._ready, []
                await self._send(sent, logged)
        if group.receipt is None:
            raise StallError(f"group {group_id} was in a call to the trajectory log that failed")
        return group.receipt

    async def recover(self, group_ids: list[int]) -> list[GroupReceipt]:
        """Receipts of groups that are in the log already: see `TrajectoryLogWriter.recover`."""
        asked = call(TrajectoryLogWriter.recover, group_ids)
        return await self._call(asked, owner="resume", deadline_s=_RECOVER_S)

    async def write_evaluation(
        self, step: int, refs: list[Ref[pa.RecordBatch]], deadline_s: float
    ) -> dict[str, float]:
        """Keep the completions of an evaluation: see `TrajectoryLogWriter.write_evaluation`."""
        asked = call(TrajectoryLogWriter.write_evaluation, step, refs)
        async with self._calling:
            return await self._call(asked, owner="evaluation", deadline_s=deadline_s)

    async def ping(self, deadline_s: float) -> None:
        """Return when the writer has answered, or one in its place."""
        writer = self.writer
        try:
            await self._answer(ask(writer, TrajectoryLogWriter.ping), "heartbeat", deadline_s)
        except RayActorError as error:
            await self._replace(writer, error)

    async def _send(self, groups: list[_Unlogged], tell: Logged) -> None:
        while groups:
            batches = [resolved(ref) for group in groups for ref in group.refs]
            sizes = [len(group.refs) for group in groups]
            owner, writer = f"group {groups[0].group_id}", self.writer
            asked = ask(writer, TrajectoryLogWriter.append, sizes, *batches)
            try:
                receipts = await self._answer(asked, owner, self._deadline_s)
                logged = dict(zip([group.group_id for group in groups], receipts, strict=True))
            except RayActorError as error:
                await self._replace(writer, error)
                found = await self.recover([group.group_id for group in groups])
                logged = {made.group_id: made for made in found}
            done = [group for group in groups if group.group_id in logged]
            whole = [_with_ref(logged[group.group_id], group.refs[0]) for group in done]
            tell(whole)
            for group, made in zip(done, whole, strict=True):
                group.receipt = made
            groups = [group for group in groups if group.receipt is None]

    async def _call(
        self, asked: Call[TrajectoryLogWriter, R], *, owner: str, deadline_s: float
    ) -> R:
        """The answer, of another writer if this one dies."""
        while True:
            writer = self.writer
            try:
                return await self._answer(asked.to(writer), owner, deadline_s)
            except RayActorError as error:
                await self._replace(writer, error)

    async def _answer(self, answer: Ref[R], owner: str, deadline_s: float) -> R:
        return await self._waits.on(
            answer, owner=owner, cause="the trajectory log", deadline_s=deadline_s
        )

    async def _replace(self, dead: Handle[TrajectoryLogWriter], error: RayActorError) -> None:
        """Put a new writer in the place of `dead`, unless that has been done."""
        if self._replacement is None or not is_own_death(error):
            raise error
        async with self._replacing:
            if self.writer is dead:
                self.writer = await self._replacement.replace("the trajectory log", dead, error)


def _with_ref(made: GroupReceipt, ref: Ref[pa.RecordBatch]) -> GroupReceipt:
    """The receipt with a reference to its group, `ref` where it has none of its own."""
    return made if made.batch_ref is not None else replace(made, batch_ref=ref)


@dataclass(eq=False)
class _Unlogged:
    group_id: int
    refs: list[Ref[pa.RecordBatch]]
    receipt: GroupReceipt | None = None
