"""The learner's ranks as one: every collective method is called on all of them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, TypeVar

from common.supervision.calls import Call, Handle, Ref, ask, call
from common.supervision.waits import Waits
from common.trajectory import GroupReceipt, batch_refs
from common.weights.transport import Receivers, Shipment
from learner.training.job import LearnerJob
from learner.training.rank import LearnerRank
from learner.training.scoring import Scores

R = TypeVar("R")


class LearnerRanks:
    """FSDP ranks, rank 0 first."""

    def __init__(
        self,
        handles: Sequence[Handle[LearnerRank]],
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
        """Have the ranks meet, load and shard the model; returns rank 0's facts."""
        address = await self._waits.on(
            ask(self.handles[0], LearnerRank.rendezvous_address),
            owner="learner",
            cause="rank 0's rendezvous",
            deadline_s=deadline_s,
        )
        return (await self._all(call(LearnerRank.setup, *address), deadline_s))[0]

    async def step(
        self,
        receipts: Sequence[GroupReceipt],
        version: int,
        max_staleness: int,
        scores: Sequence[Ref[Scores]] | None = None,
    ) -> dict[str, float]:
        """Take a learner step on these groups; returns the metrics of the whole step.

        Args:
            scores: what a scorer elsewhere said of each group.
        """
        refs = batch_refs(receipts)
        logged = self._credit_every > 0 and (version + 1) % self._credit_every == 0
        run = self._credit_run if logged else None
        step = call(LearnerRank.step, refs, version, max_staleness, run, scores)
        return (await self._all(step))[0]

    def fetch_ahead(self, receipt: GroupReceipt) -> None:
        """Have a group that a later step will train on brought to the nodes of the ranks.

        Nobody waits for the answer: a rank or a batch that is lost is found by `step`.
        """
        for handle in self.handles:
            ask(handle, LearnerRank.fetch_ahead, batch_refs([receipt]))

    async def open_transport(self, receivers: Receivers, deadline_s: float) -> None:
        """Make every rank's end of the weight transport."""
        await self._all(call(LearnerRank.open_transport, receivers), deadline_s)

    async def export_weights(self, version: int) -> Shipment:
        """Send the weights on their way through the transport."""
        return (await self._all(call(LearnerRank.export_weights, version)))[0]

    async def release_memory(self, deadline_s: float) -> None:
        """Give memory that is kept for the next step back to devices that generators share."""
        await self._all(call(LearnerRank.release_memory), deadline_s)

    async def score(
        self, sequences: list[list[int]], prompt_lengths: list[int]
    ) -> list[list[float]]:
        """Canary scores under the learner's weights."""
        return (await self._all(call(LearnerRank.score, sequences, prompt_lengths)))[0]

    async def take_checkpoint(self, extra: dict[str, Any], deadline_s: float) -> None:
        """Copy a checkpoint into the ranks' memory."""
        await self._all(call(LearnerRank.take_checkpoint, extra), deadline_s)

    async def write_checkpoint(self, folder: str, deadline_s: float) -> None:
        """Write what was taken and put it in place; other calls run beside this one."""
        await self._all(call(LearnerRank.write_checkpoint, folder), deadline_s)

    async def load_checkpoint(self, folder: str, deadline_s: float) -> dict[str, Any]:
        """Go on from a checkpoint; returns the `extra` that was saved."""
        return (await self._all(call(LearnerRank.load_checkpoint, folder), deadline_s))[0]

    async def ping(self, deadline_s: float) -> None:
        """Wait until every rank has answered, whatever it is doing."""
        await self._all(call(LearnerRank.ping), deadline_s, owner="heartbeat")

    async def begin(self, job: LearnerJob, deadline_s: float) -> None:
        """Start over for another run in the same processes; `setup` follows."""
        await self._all(call(LearnerRank.begin, job), deadline_s)

    async def shutdown(self, deadline_s: float) -> None:
        await self._all(call(LearnerRank.shutdown), deadline_s)

    async def _all(
        self, asked: Call[LearnerRank, R], deadline_s: float | None = None, owner: str = ""
    ) -> list[R]:
        """The answers, rank 0's first; `deadline_s` is the step's where none is given."""
        answers = [
            self._waits.on(
                asked.to(handle),
                owner=owner or f"learner {asked.name}",
                cause=f"learner rank {rank}" if owner else f"rank {rank}",
                deadline_s=deadline_s or self._step_timeout_s,
            )
            for rank, handle in enumerate(self.handles)
        ]
        return await asyncio.gather(*answers)
