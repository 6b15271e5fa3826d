"""What the actors' side of a run keeps for a resume, and how it goes on from there.

A checkpoint of the learner is one of the whole run: `save` cuts the ledger where it is taken, and
`resume` takes ledger, prompts, guidance and finished groups back to that place.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from actors.data.prompts import PromptSource
from actors.rollout.group_book import GroupBook
from actors.rollout.guidance import Guidance
from common.config.follow_up import FollowUpConfig
from common.record.ledger import Outcome
from common.record.writer import TrajectoryLogClient
from common.trajectory import GroupReceipt


@dataclass(frozen=True)
class RolloutState:
    """The parts of the actors' side that a checkpoint is about: it can be saved and resumed."""

    source: PromptSource
    book: GroupBook
    guidance: Guidance
    log: TrajectoryLogClient
    group_size: int
    follow_up: FollowUpConfig

    def save(self, step: int) -> dict[str, Any]:
        """State for the checkpoint of `step`. Prompts and groups are in the ledger."""
        self.book.cut(step)
        return {"guidance": self.guidance.state_dict()}

    async def resume(self, step: int, state: dict[str, Any]) -> tuple[int, int]:
        """Go on at the checkpoint of `step`; call it before anything is dispatched.

        Groups that were verified and not trained on come back from the trajectory log. The tickets
        of all others are served again.

        Args:
            state: what `save` returned; empty at step 0.

        Returns:
            (groups taken from the log, tickets to be served again).
        """
        if state:
            self.guidance.load_state_dict(state["guidance"], step)
        opened = self.book.roll_back(step)
        logged = {
            receipt.group_id: receipt
            for receipt in await self.log.recover([group.group_id for group in opened])
        }
        asked = {group.group_id: group.completions for group in opened}  # follow-ups included
        usable = [
            receipt
            for receipt in logged.values()
            if receipt.every.completions == asked[receipt.group_id]
            and self._is_usable(receipt, step)
        ]
        kept = {receipt.group_id for receipt in self.book.take_back(usable, step)}
        too_old = {receipt.group_id for receipt in usable} - kept
        lost = [group for group in opened if group.group_id not in kept]
        for group in lost:
            outcome: Outcome = "stale" if group.group_id in too_old else "abandoned"
            self.book.give_up(group, logged.get(group.group_id), outcome)
        self.source.seek(*self.book.cursor())
        return len(kept), len(lost)

    def _is_usable(self, receipt: GroupReceipt, step: int) -> bool:
        """Whether only the bound can forbid a group: it is whole, and teaches something.

        One with a token of a version behind the checkpoint is not: that version is lost with the
        steps that made it.
        """
        return (
            max(receipt.max_version, receipt.dispatch_version) <= step
            and self.follow_up.fits(receipt.num_completions, self.group_size)
            and not self.book.teaches_nothing(receipt)
        )
