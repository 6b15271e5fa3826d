"""The staleness budget: at most (S + 1) * P groups between prompt and learner.

Symbols: P prompts a step, S = `max_staleness`, v the learner's version (the number of its
steps), u <= v the version every live generator holds.

Rule 1 (`StalenessBudget`): a group is dispatched only while fewer than (S + 1) * P slots are
taken; the P slots of a step are given back when its new version is held by every generator. A
group that is dropped gives its slot back at once.
Rule 2 (`GroupWindow.take`): the learner at version v takes P complete groups, oldest first. It
waits until the step leaves every older group a place in time: a group dispatched at u must be
trained at version u + S or before, so for each w >= v, of the groups dispatched at w - S or before
all but (w - v) * P, the places that the steps after this one still offer, must be complete.

Bound: no trained token is more than S versions older than the learner. A group dispatched at u
has tokens of version >= u only, and rule 2 with w = v lets no step pass its version u + S.
Rule 2 can always be met: it never waits for more than P groups, because the groups dispatched at
w - S or before and not yet trained never number more than (w - v + 1) * P.
- Dispatch at u keeps this: of the (S + 1) * P slots, (v - u) * P belong to steps not yet held by
  every generator, so with w = u + S at most (S + 1) * P - (v - u) * P = (w - v + 1) * P groups are
  between dispatch and learner.
- Training keeps it: that is what rule 2 asks of a step.
Pacing (waiting for a straggler when its place would be lost) holds the bound; nothing is dropped
for age. Before that a straggler holds up nobody.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from common.trajectory import GroupReceipt


class StalenessBudget:
    """Counts slots; the module's docstring says what that guarantees."""

    def __init__(self, max_staleness: int, prompts_per_step: int) -> None:
        if max_staleness < 0 or prompts_per_step < 1:
            raise ValueError(f"max_staleness {max_staleness}, prompts_per_step {prompts_per_step}")
        self.capacity = (max_staleness + 1) * prompts_per_step
        self.in_use = 0

    def try_acquire(self) -> bool:
        """Take a slot if one is free."""
        if self.in_use >= self.capacity:
            return False
        self.in_use += 1
        return True

    def acquire_free(self) -> int:
        """Take all slots that are free; returns how many."""
        free, self.in_use = self.capacity - self.in_use, self.capacity
        return free

    def release(self, slots: int) -> None:
        """Give slots back. Raises `ValueError` when more are given back than were taken."""
        if not 0 <= slots <= self.in_use:
            raise ValueError(f"release of {slots} slots, {self.in_use} in use")
        self.in_use -= slots


class GroupWindow:
    """The groups between dispatch and learner, and the choice of the next step's P."""

    def __init__(self, max_staleness: int, prompts_per_step: int) -> None:
        self._max_staleness = max_staleness
        self._prompts_per_step = prompts_per_step
        self._dispatched: dict[int, int] = {}  # group id -> dispatch version, not yet complete
        self._complete: dict[int, GroupReceipt] = {}
        # How many groups there are of each dispatch version, and how many of these are complete.
        # `missing` is asked for with every group that ends, so it must not count them anew.
        self._held: Counter[int] = Counter()
        self._ready: Counter[int] = Counter()

    def dispatch(self, group_id: int, version: int) -> None:
        """A group was sent out while the generators held `version`."""
        self._dispatched[group_id] = version
        self._held[version] += 1

    def complete(self, receipt: GroupReceipt) -> None:
        """A group is verified and logged."""
        _take_one(self._held, self._dispatched.pop(receipt.group_id))
        self._complete[receipt.group_id] = receipt
        self._held[receipt.dispatch_version] += 1
        self._ready[receipt.dispatch_version] += 1

    def drop(self, group_id: int) -> None:
        """A group left without being trained on (failed or filtered)."""
        if (version := self._dispatched.pop(group_id, None)) is None:
            self._leave(self._complete[group_id])
        else:
            _take_one(self._held, version)

    def _leave(self, receipt: GroupReceipt) -> None:
        del self._complete[receipt.group_id]
        _take_one(self._held, receipt.dispatch_version)
        _take_one(self._ready, receipt.dispatch_version)

    def missing(self, version: int) -> int:
        """How many more groups must complete before the learner at `version` may take a step."""
        missing, older, ready = self._prompts_per_step - len(self._complete), 0, 0
        for held in sorted(self._held):
            older += self._held[held]
            ready += self._ready[held]
            places_left = (held + self._max_staleness - version) * self._prompts_per_step
            missing = max(missing, older - places_left - ready)
        return max(missing, 0)

    def take(self, version: int) -> list[GroupReceipt] | None:
        """The P groups to train at `version`, oldest first; None while they are not there."""
        if self.missing(version):
            return None
        taken = _oldest_first(self._complete.values())[: self._prompts_per_step]
        for receipt in taken:
            self._leave(receipt)
        return taken

    @property
    def num_complete(self) -> int:
        """Groups that wait for the learner."""
        return len(self._complete)

    @property
    def num_dispatched(self) -> int:
        """Groups that are being sampled or verified."""
        return len(self._dispatched)

    def outstanding(self) -> Iterable[int]:
        """Ids of every group dispatched and not taken."""
        return [*self._dispatched, *self._complete]


def in_time(
    receipts: Iterable[GroupReceipt], version: int, max_staleness: int, prompts_per_step: int
) -> list[GroupReceipt]:
    """The complete groups that a learner at `version` can still train within the bound.

    They come oldest first, and the k-th is trained at version + k // P. So at most (S + 1) * P are
    in time. Every group that was out when a run ended is in time, unless the run goes on with a
    smaller S or P.
    """
    kept: list[GroupReceipt] = []
    for receipt in _oldest_first(receipts):
        if version + len(kept) // prompts_per_step <= receipt.dispatch_version + max_staleness:
            kept.append(receipt)
    return kept


def _take_one(counts: Counter[int], version: int) -> None:
    counts[version] -= 1
    if not counts[version]:
        del counts[version]


def _oldest_first(receipts: Iterable[GroupReceipt]) -> list[GroupReceipt]:
    """A ticket's place does not depend on how often it was dispatched, or in which process."""
    return sorted(receipts, key=lambda group: (group.dispatch_version, group.ticket))
