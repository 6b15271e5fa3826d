"""Who of a pool has the least to do: found without looking at every member.

A cluster has thousands of generators and verifiers, and somebody is chosen twice for every group.
"""

from __future__ import annotations

import heapq
import itertools
from collections import Counter
from collections.abc import Iterable

_ROOM = 64
"""Outdated entries that are always kept: below this, building anew is not worth its while."""


class Loads:
    """How many calls each member has under way. Of equals, the one that joined first is chosen."""

    def __init__(self, members: Iterable[str]) -> None:
        self._calls: Counter[str] = Counter()  # kept of who leaves: its calls have yet to end
        self._joined: dict[str, int] = {}
        self._numbers = itertools.count()
        # (calls, place, name); one whose calls or place are no longer so is passed over.
        self._heap: list[tuple[int, int, str]] = []
        for name in members:
            self.join(name)

    def join(self, name: str) -> None:
        """A member serves from now on."""
        self._joined[name] = next(self._numbers)
        self._push(name)

    def leave(self, name: str) -> None:
        """A member serves no more."""
        del self._joined[name]

    def least(self) -> str:
        """The member with the fewest calls under way.

        Raises:
            IndexError: there is no member.
        """
        while not self._holds(*self._heap[0]):
            heapq.heappop(self._heap)
        return self._heap[0][2]

    def add(self, name: str, calls: int) -> None:
        """So many more calls of a member are under way; below 0, fewer."""
        self._calls[name] += calls
        if name in self._joined:
            self._push(name)

    def _holds(self, calls: int, place: int, name: str) -> bool:
        return self._joined.get(name) == place and self._calls[name] == calls

    def _push(self, name: str) -> None:
        if len(self._heap) > 4 * len(self._joined) + _ROOM:
            self._heap = [(self._calls[each], at, each) for each, at in self._joined.items()]
            heapq.heapify(self._heap)
        else:
            heapq.heappush(self._heap, (self._calls[name], self._joined[name], name))
