"""The learner's ranks as one: every collective method is called on all of them.

Plain handles in, so that the coordinator never imports torch through this module.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from common.supervision.heartbeat import HEALTH
from common.supervision.waits import Waits
from common.trajectory import GroupReceipt
from common.weights import WeightBucket

if TYPE_CHECKING:
    from learner.training.job import LearnerJob

WRITING = "writing"
"""The concurrency group of the ranks' actors in which checkpoints are written."""


class LearnerRanks:
    """FSDP ranks, rank 0 first."""

    def __init__(
        self,
        handles: Sequence[Any],
        waits: Waits,
        step_timeout_s: float,
        credit_run: str | None = None,
        credit_every: int = 1,
    ) -> None:
        """`credit_run`: run directory for the credit log of every `credit_every`-th step."""
        self.handles = list(handles)
        self._waits = waits
        self._step_timeout_s = step_timeout_s
        self._credit_run = credit_run
        self._credit_every = credit_every

    async def setup(self, deadline_s: float) -> dict[str, Any]:
        """Rendezvous, load, shard. Returns rank 0's facts."""
        address = await self._waits.on(
            self.handles[0].rendezvous_address.remote(),
            owner="learner",
            cause="rank 0's rendezvous",
            deadline_s=deadline_s,
        )
        facts: dict[str, Any] = (await self._all("setup", *address, deadline_s=deadline_s))[0]
        return facts

    async def step(
        self, receipts: Sequence[GroupReceipt], version: int, max_staleness: int
    ) -> dict[str, float]:
        """One optimiser step over these groups; metrics of the whole step."""
        refs = [receipt.batch_ref for receipt in receipts]
        logged = self._credit_every > 0 and (version + 1) % self._credit_every == 0
        run = self._credit_run if logged else None
        metrics: dict[str, float] = (await self._all("step", refs, version, max_staleness, run))[0]
        return metrics

    def fetch_ahead(self, receipt: GroupReceipt) -> None:
        """Have a group that a later step will train on brought to the nodes of the ranks.

        Nobody waits for the answer: a rank or a batch that is lost is found by `step`.
        """
        for handle in self.handles:
            handle.fetch_ahead.options(concurrency_group=HEALTH).remote([receipt.batch_ref])

    async def export_weights(self, version: int) -> list[WeightBucket]:
        """The weights as buckets in the object store."""
        buckets: list[WeightBucket] = (await self._all("export_weights", version))[0]
        return buckets

    async def open_transport(
        self, backend: str, generators: list[Any], workers_each: int, deadline_s: float
    ) -> None:
        """Join vLLM's own weight transfer (`nccl`, `ipc`)."""
        await self._all(
            "open_transport",
            backend,
            generators,
            workers_each,
            deadline_s,
            deadline_s=deadline_s,
        )

    async def send_weights(self, version: int) -> tuple[float, int]:
        """Weights from device to device: (seconds generation stood still, bytes)."""
        sent: tuple[float, int] = (await self._all("send_weights", version))[0]
        return sent

    async def release_memory(self, deadline_s: float) -> None:
        """Give memory that is kept for the next step back to devices that generators share."""
        await self._all("release_memory", deadline_s=deadline_s)

    async def score(
        self, sequences: list[list[int]], prompt_lengths: list[int]
    ) -> list[list[float]]:
        """Canary scores under the learner's weights."""
        scores: list[list[float]] = (await self._all("score", sequences, prompt_lengths))[0]
        return scores

    async def take_checkpoint(self, extra: dict[str, Any], deadline_s: float) -> None:
        """Copy a checkpoint into the ranks' memory."""
        await self._all("take_checkpoint", extra, deadline_s=deadline_s)

    async def write_checkpoint(self, folder: str, deadline_s: float) -> None:
        """Write what was taken and put it in place; other calls run beside this one."""
        await self._all("write_checkpoint", folder, deadline_s=deadline_s, group=WRITING)

    async def load_checkpoint(self, folder: str, deadline_s: float) -> dict[str, Any]:
        """Returns the `extra` that was saved."""
        loaded = await self._all("load_checkpoint", folder, deadline_s=deadline_s)
        extra: dict[str, Any] = loaded[0]
        return extra

    async def ping(self, deadline_s: float) -> None:
        """Returns when every rank has answered, whatever it is doing."""
        await self._all("ping", deadline_s=deadline_s, group=HEALTH, owner="heartbeat")

    async def begin(self, job: LearnerJob, deadline_s: float) -> None:
        """Another run in the same processes; `setup` follows."""
        await self._all("begin", job, deadline_s=deadline_s)

    async def shutdown(self, deadline_s: float) -> None:
        await self._all("shutdown", deadline_s=deadline_s)

    async def _all(
        self,
        method: str,
        *args: Any,
        deadline_s: float | None = None,
        group: str | None = None,
        owner: str = "",
    ) -> list[Any]:
        options = {"concurrency_group": group} if group else {}
        calls = [
            self._waits.on(
                getattr(handle, method).options(**options).remote(*args),
                owner=owner or f"learner {method}",
                cause=f"learner rank {rank}" if owner else f"rank {rank}",
                deadline_s=deadline_s or self._step_timeout_s,
            )
            for rank, handle in enumerate(self.handles)
        ]
        return list(await asyncio.gather(*calls))
