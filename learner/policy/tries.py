"""Which rows of a packed segment a completion reads: those of the prompt, of others, and its own.

A completion that was given the first tokens of another (`learner.algorithm.rewarded.Trees`) has no
rows for them where both are in one segment: it reads the other's. So a group that is a tree is a
trie in its row, and each token of it is computed once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class SegmentLengths:
    """Lengths of one segment, in row order: the prompt, then the rows of its completions."""

    prompt: int
    completions: tuple[int, ...]
    parents: tuple[int, ...] = ()
    """By place in `completions`, whose rows a completion reads behind the prompt, which stands
    before it; -1: nobody's. Empty where no completion reads another's."""
    given: tuple[int, ...] = ()
    """How many rows of the other it reads behind the prompt, along its way; likewise."""

    @property
    def tokens(self) -> int:
        return self.prompt + sum(self.completions)

    @property
    def root(self) -> int:
        """Tokens of the root: a single completion belongs to it."""
        return self.tokens if len(self.completions) == 1 else self.prompt

    @property
    def given_to(self) -> tuple[int, ...]:
        """Tokens behind the prompt that each completion reads of another."""
        return self.given or (0,) * len(self.completions)

    @property
    def read_of(self) -> tuple[int, ...]:
        """Whose rows each completion reads behind the prompt; -1: nobody's."""
        return self.parents or (-1,) * len(self.completions)

    @property
    def longest(self) -> int:
        """Tokens of the longest way."""
        pairs = zip(self.given_to, self.completions, strict=True)
        return self.prompt + max((given + own for given, own in pairs), default=0)

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """The first row of each completion, from the segment's first."""
        return tuple(self.prompt + int(n) for n in np.cumsum((0, *self.completions))[:-1])

    @cached_property
    def ways(self) -> tuple[Ints, ...]:
        """Rows of the prompt and of all tokens of each completion, from the segment's first."""
        found: list[Ints] = []
        for parent, given, own, first in zip(
            self.read_of, self.given_to, self.completions, self.offsets, strict=True
        ):
            above = np.arange(self.prompt) if parent < 0 else found[parent][: self.prompt + given]
            found.append(np.concatenate((above, np.arange(first, first + own))))
        return tuple(found)

    def leaves(self) -> list[tuple[int, int]]:
        """Offset behind the segment's first row, and length, of every leaf of the prompt alone."""
        if len(self.completions) < 2:
            return []
        found = zip(self.read_of, self.offsets, self.completions, strict=True)
        return [(first, own) for parent, first, own in found if parent < 0]

    def branches(self) -> Iterator[tuple[int, int, Ints]]:
        """Offset, length, and the rows before them, of what reads another completion's rows."""
        for place, parent in enumerate(self.parents):
            if parent >= 0:
                own = self.completions[place]
                yield self.offsets[place], own, self.ways[place][: len(self.ways[place]) - own]
