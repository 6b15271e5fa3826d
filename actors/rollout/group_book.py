"""The book of groups: where each one is between dispatch and learner, and what became of it.

    slots       waits until the staleness budget lets other groups out
    dispatched  they are on their way                           ledger, window
    followed_up more of it is on its way                    ledger
    verified    it is in the trajectory log                 ledger
    settle      it is ready for the learner, or dropped     window, or ledger and its slot is free
    take        the next step's groups                      window
    trained     a step was made of them                     ledger
    release     their slots are free, once the step's version is held by every generator

Three records say the same thing of a group for three readers. The *budget* counts slots, which
bounds staleness (`common.budget`). The *window* chooses the next step's groups. The *ledger* is on
the disk, for a resume. They change together, in here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from common.budget import GroupWindow, StalenessBudget, in_time
from common.errors import StallError
from common.record.ledger import Ledger, OpenGroup, Outcome, Outcomes, outcomes_of
from common.supervision.faults import reached
from common.supervision.waits import Waits, until
from common.trajectory import GroupReceipt, GroupRequest


class GroupBook:
    """The groups of one run. One per run, in the coordinator."""

    def __init__(
        self,
        ledger: Ledger,
        waits: Waits,
        *,
        max_staleness: int,
        groups_per_step: int,
        dynamic_sampling: bool = False,
        announce: Callable[[GroupReceipt], None] | None = None,
    ) -> None:
        """`dynamic_sampling`: groups whose rewards are all equal are dropped.

        `announce`: told of every group that is ready to be trained on, before it is taken.
        """
        self._ledger = ledger
        self._waits = waits
        self._max_staleness = max_staleness
        self._groups_per_step = groups_per_step
        self._dynamic_sampling = dynamic_sampling
        self._announce = announce
        self._budget = StalenessBudget(max_staleness, groups_per_step)
        self._window = GroupWindow(max_staleness, groups_per_step)
        self._changed = asyncio.Condition()
        self._next_group_id = ledger.next_group_id()
        self._counts = {"groups/dispatched": 0.0, "groups/filtered": 0.0, "groups/abandoned": 0.0}

    # The generation loop's side

    async def slots(self) -> int:
        """Returns when more groups may go out, and how many; their slots are taken."""
        free: int = await until(self._changed, lambda: self._budget.acquire_free() or None)
        return free

    def new_group_id(self) -> int:
        """A number that no group of the run has had."""
        self._next_group_id += 1
        return self._next_group_id - 1

    def dispatched(self, requests: Sequence[GroupRequest]) -> None:
        """Groups are about to go out."""
        self._counts["groups/dispatched"] += len(requests)
        with self._ledger.together():
            for request in requests:
                self._ledger.dispatched(request)
        for request in requests:
            self._window.dispatch(request.group_id, request.dispatch_version)
            reached("group dispatched")

    def followed_up(self, request: GroupRequest, more: int) -> GroupRequest:
        """`more` completions of a group are about to go out; the request for all of them."""
        whole = replace(request, num_completions=request.num_completions + more)
        self._ledger.followed_up(whole.group_id, whole.num_completions)
        reached("group followed up")
        return whole

    def verified(self, receipts: Sequence[GroupReceipt]) -> None:
        """Groups are in the trajectory log."""
        for _ in receipts:
            reached("group in the log")
        with self._ledger.together():
            for receipt in receipts:
                self._ledger.verified(receipt.group_id, receipt.every.tokens)
        for _ in receipts:
            reached("group verified")

    async def settle(self, request: GroupRequest, receipt: GroupReceipt | None) -> None:
        """A group is over: ready for the learner, or dropped, and another takes its slot.

        Args:
            receipt: None when nothing of it ended in time.
        """
        async with self._changed:
            if receipt is None or receipt.every.completions < request.num_completions:
                self._counts["groups/abandoned"] += 1
                tokens = receipt.every.tokens if receipt else 0
                self._drop(request.group_id, {"abandoned": (request.num_completions, tokens)})
            elif self.teaches_nothing(receipt):
                self._counts["groups/filtered"] += 1
                outcome: Outcome = "failed" if receipt.unjudged else "filtered"
                self._drop(request.group_id, outcomes_of(receipt, outcome))
            else:
                self._complete(receipt)
            self._changed.notify_all()

    def teaches_nothing(self, receipt: GroupReceipt) -> bool:
        """No usable reward, or (with dynamic sampling) no difference in reward."""
        return receipt.unjudged or (self._dynamic_sampling and receipt.rewards_equal)

    def _complete(self, receipt: GroupReceipt) -> None:
        self._window.complete(receipt)
        if self._announce is not None:
            self._announce(receipt)

    def _drop(self, group_id: int, outcomes: Outcomes) -> None:
        self._ledger.close_group(group_id, outcomes)
        self._window.drop(group_id)
        self._budget.release(1)

    # The learner's loop's side

    async def take(self, version: int, deadline_s: float) -> list[GroupReceipt]:
        """The next step's groups (see `common.budget`). Raises `StallError` at the deadline."""
        receipts = await self._waits.on(
            until(self._changed, lambda: self._window.take(version)),
            owner="learner",
            cause=f"{self._groups_per_step} verified groups",
            deadline_s=deadline_s,
        )
        if not receipts:
            raise StallError("the window gave no groups")
        taken: list[GroupReceipt] = receipts
        return taken

    def trained(self, step: int, receipts: list[GroupReceipt]) -> None:
        """Learner step `step` was made of these groups."""
        self._ledger.trained(step, receipts)

    async def release(self) -> None:
        """A step's version is held by every generator: its slots are free."""
        async with self._changed:
            self._budget.release(self._groups_per_step)
            self._changed.notify_all()

    def metrics(self) -> dict[str, float]:
        """Counts of groups since the run, or its last resume, began."""
        return dict(self._counts)

    def status(self) -> str:
        """One line for the display."""
        return (
            f"{self._window.num_dispatched} groups under way, {self._window.num_complete} ready, "
            f"{self._budget.in_use}/{self._budget.capacity} slots"
        )

    # Checkpoints and resumes (`actors.rollout.resume`)

    def cut(self, step: int) -> None:
        """A checkpoint of `step` is about to be taken."""
        self._ledger.cut(step)

    def roll_back(self, step: int) -> list[OpenGroup]:
        """Go back to the checkpoint of `step`; the groups that were open then, by ticket."""
        return self._ledger.roll_back(step)

    def take_back(self, receipts: Iterable[GroupReceipt], step: int) -> list[GroupReceipt]:
        """Groups of an earlier process, ready for the learner again; those that the bound allows.

        Call it once, before anything is dispatched: slots are taken without waiting for one.
        """
        kept = in_time(receipts, step, self._max_staleness, self._groups_per_step)
        for receipt in kept:
            self._budget.try_acquire()
            self._window.dispatch(receipt.group_id, receipt.dispatch_version)
            self._complete(receipt)
            self._ledger.verified(receipt.group_id, receipt.every.tokens)
        return kept

    def give_up(self, group: OpenGroup, logged: GroupReceipt | None, outcome: Outcome) -> None:
        """A group of an earlier process is not trained on; its ticket is served again."""
        tokens = logged.every.tokens if logged else 0
        if logged is not None:
            self._ledger.verified(group.group_id, tokens)
        self._ledger.close_group(
            group.group_id,
            {outcome: (group.completions, tokens)},
            again=True,
            reason="not there after a resume",
        )

    def cursor(self) -> tuple[int, list[int]]:
        """(the next new ticket, earlier tickets to serve again)."""
        return self._ledger.cursor()
