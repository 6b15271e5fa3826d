"""The trajectory stream: verified groups go into the log, receipts come out.

An actor of its own, so that the coordinator never touches tokens. The batch stays where it is in
Ray's object store; the stream maps it, checks it, appends it to the log, and returns a receipt.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet
import ray

from common.log_store import TrajectoryLog, read_segment, segments
from common.schema import sampled_lengths, trajectory_schema
from common.stacks import arm
from common.trajectory import GroupReceipt


class TrajectoryStream:
    """Owns the trajectory log of a run directory."""

    def __init__(self, run_folder: str, verifiers: list[str]) -> None:
        arm()
        self._schema = trajectory_schema(verifiers)
        self._run_folder = Path(run_folder)
        self._log = TrajectoryLog(self._run_folder / "trajectories", self._schema)

    def ready(self) -> bool:
        """Answers once the actor has started."""
        return True

    def append(self, *batches: pa.RecordBatch) -> GroupReceipt:
        """Log one verified group, in one batch or several.

        The receipt refers to the group as a whole: to a batch of its own where there were several,
        to nothing (None) where the caller's only reference is the group's already. References are
        arguments of their own, not a list of them: Ray then resolves them, and does so three
        times as fast as a `get` in here, which has to ask their owner.

        Raises:
            ValueError: a batch does not have the run's schema.
            OSError: the log cannot be written.
        """
        for batch in batches:
            if not batch.schema.equals(self._schema, check_metadata=False):
                raise ValueError(f"group has schema {batch.schema}, the log has {self._schema}")
        group, ref = batches[0], None
        if len(batches) > 1:
            group = pa.concat_batches(batches).sort_by("completion_index")
            ref = ray.put(group)
        self._log.append(group)
        return receipt(group, ref)

    def recover(self, group_ids: list[int]) -> list[GroupReceipt]:
        """Receipts of those groups that an earlier process of the run has logged whole.

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
                    found.append(receipt(batch, ray.put(batch)))
        return found

    def write_evaluation(self, step: int, refs: list[Any]) -> dict[str, float]:
        """Keep the held-out completions of one evaluation as `evaluations/step-N.parquet`.

        Returns its sums: accuracy over all completions, those without a verdict counting as wrong.
        """
        folder = self._run_folder / "evaluations"
        folder.mkdir(exist_ok=True)
        table = pa.Table.from_batches(ray.get(refs, timeout=60.0), schema=self._schema)
        pa.parquet.write_table(table, folder / f"step-{step:06d}.parquet", compression="zstd")
        accuracy = table.column("accuracy").to_numpy()
        lengths = pc.list_value_length(table.column("token_ids"))
        return {
            "eval/accuracy": float(np.nansum(accuracy)) / table.num_rows,
            "eval/unscored": float(np.isnan(accuracy).sum()),
            "eval/length": float(pc.mean(lengths).as_py()),
        }

    def close(self) -> None:
        """Close the open segment."""
        self._log.close()


def receipt(batch: pa.RecordBatch, ref: Any) -> GroupReceipt:
    """Sum a verified group up for the control plane."""
    lengths_G = sampled_lengths(batch)
    rewards_G = batch.column("reward").to_numpy(zero_copy_only=False).astype(np.float64)
    scored = rewards_G[~np.isnan(rewards_G)]
    versions = batch.column("weight_versions").flatten()
    dispatch_version = batch.column("dispatch_version")[0].as_py()
    return GroupReceipt(
        group_id=batch.column("group_id")[0].as_py(),
        turn=batch.column("turn")[0].as_py(),
        batch_ref=ref,
        dispatch_version=dispatch_version,
        min_version=pc.min(versions).as_py() if len(versions) else dispatch_version,
        max_version=pc.max(versions).as_py() if len(versions) else dispatch_version,
        num_completions=batch.num_rows,
        num_tokens=int(lengths_G.sum()),
        reward_mean=float(scored.mean()) if scored.size else float("nan"),
        rewards_equal=bool(scored.size == 0 or scored.min() == scored.max()),
        num_unscored=int(np.isnan(rewards_G).sum()),
        unscored_tokens=int(lengths_G[np.isnan(rewards_G)].sum()),
        generate_s=pc.max(batch.column("finished_s")).as_py()
        - batch.column("dispatched_s")[0].as_py(),
    )


TrajectoryStreamActor = ray.remote(TrajectoryStream)
