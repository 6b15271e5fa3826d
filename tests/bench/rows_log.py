"""Groups through the log's writer and the ledger, no model: 8 completions of 1,000 tokens each."""

from __future__ import annotations

import asyncio
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import ray
from harness import Row, emit
from learner_models import trajectories

from common.record.ledger import Ledger
from common.record.writer import TrajectoryLogClient, TrajectoryLogWriter
from common.supervision.calls import Handle, Ref, ask, get_all, put, start_actor
from common.supervision.waits import Waits
from common.trajectory import GroupReceipt, GroupRequest

GROUPS, REPEATS, STEP, UNDER_WAY = 320, 5, 16, 32


async def pass_through(
    writer: Handle[TrajectoryLogWriter],
    ledger: Ledger,
    refs: list[Ref[pa.RecordBatch]],
    first: int,
) -> None:
    """Every group dispatched, logged, booked and trained on, as a run's coordinator does it."""
    slots = asyncio.Semaphore(UNDER_WAY)
    log = TrajectoryLogClient(writer, Waits(), deadline_s=60.0)

    async def one(group: int) -> GroupReceipt:
        async with slots:
            ledger.dispatched(GroupRequest(group, group, "p", 0, "", "", [], "", 8, 1, 1.0, 0, 0.0))
            receipt = await log.append(group, [refs[group % len(refs)]])
            ledger.verified(group, receipt.num_tokens)
            return replace(receipt, group_id=group)

    receipts = await asyncio.gather(*[one(first + index) for index in range(GROUPS)])
    for start in range(0, GROUPS, STEP):
        ledger.trained(start // STEP, receipts[start : start + STEP])


def main() -> None:
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    batches = trajectories([(200, [1000] * 8)] * 20)
    refs = [put(batch) for batch in batches]
    nbytes = batches[0].nbytes
    rates, ratios = [], []
    source = np.random.default_rng(0).integers(0, 255, nbytes, dtype=np.uint8)
    with tempfile.TemporaryDirectory() as name:
        writer = start_actor(TrajectoryLogWriter, {"num_cpus": 0}, name, ["test"])
        ledger = Ledger(Path(name) / "ledger.sqlite", "made up")
        asyncio.run(pass_through(writer, ledger, refs, 0))  # warms up
        for repeat in range(1, REPEATS + 1):
            started = time.perf_counter()
            asyncio.run(pass_through(writer, ledger, refs, repeat * GROUPS))
            taken = time.perf_counter() - started
            started = time.perf_counter()
            for _ in range(GROUPS):
                source.copy()
            copied = time.perf_counter() - started
            rates.append(GROUPS / taken)
            ratios.append(taken / copied)
        ledger.end()
        # Its Parquet twins are in the folder too.
        get_all([ask(writer, TrajectoryLogWriter.close)], timeout_s=60)
        writer.kill()
    ray.shutdown()
    emit(
        [
            Row(
                "groups per second through the log and the ledger, 8 x 1,000 tokens",
                "500 groups a second",
                [rate / 500 for rate in rates],
                1.0,
                True,
                f"{np.median(rates):.0f} groups/s of {nbytes / 2**10:.0f} KiB; "
                f"{np.median(ratios):.0f} times a memory copy of the bytes",
            )
        ]
    )


if __name__ == "__main__":
    main()
