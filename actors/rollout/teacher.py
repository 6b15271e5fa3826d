"""Generators that hold a teacher: they score what the policy sampled, and sample nothing.

The tokens of a group go from the object store to a teacher, and its scores from there to the
learner; the coordinator has references alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from actors.generation.generator import Generator
from actors.rollout.pool import Pool
from common.supervision.calls import Ref, ask_pair, resolved
from common.trajectory import GroupReceipt, batch_refs

Scores = npt.NDArray[np.float32]


class TeacherPool(Pool[Generator]):
    """Teachers. The death of one ends the run, which goes on from its last checkpoint."""

    kind = "teachers"

    async def score(self, receipts: Sequence[GroupReceipt], deadline_s: float) -> list[Ref[Scores]]:
        """References to the scores of groups, in their order, each the tokens of its rows.

        Args:
            deadline_s: for each group, with all groups before it.
        """
        scored = [self._score(receipt, deadline_s) for receipt in receipts]
        return list(await asyncio.gather(*scored))

    async def _score(self, receipt: GroupReceipt, deadline_s: float) -> Ref[Scores]:
        (batch,) = batch_refs([receipt])
        with self.least_loaded() as name:
            scores, done = ask_pair(self.handles[name], Generator.score_group, resolved(batch))
            await self.waits.on(
                done,
                owner=f"group {receipt.group_id}",
                cause=f"its scores from {name} (teacher.score_timeout_s)",
                deadline_s=deadline_s,
            )
            return scores
