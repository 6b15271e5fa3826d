"""Values of prefixes from sampled continuations, and what each segment between them brought.

    V(t)   mean reward of the continuations of the first t tokens
    A_j    V(t_{j+1}) - V(t_j), the measured advantage of segment j; V is R at the end

The A_j of a completion add up to R - V(t_0).

Legend: K continuations of a branch, J segments of a completion.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Measured:
    """The branches of one completion, with the rewards of their continuations."""

    points: tuple[int, ...]
    """Tokens before each branch, ascending."""
    length: int
    """Tokens of the completion."""
    reward: float
    rewards: tuple[tuple[float, ...], ...]
    """Rewards of each branch's continuations, of those that have one."""
    span: tuple[float, float]
    """Lowest and highest reward that there is."""

    @property
    def values_J(self) -> Floats:
        """V of every branch; NaN where no continuation has a reward."""
        return np.array([np.mean(each) if each else math.nan for each in self.rewards])

    @property
    def errors_J(self) -> Floats:
        """Standard error of every value; NaN where there is none."""
        return np.array([standard_error(each, self.span) for each in self.rewards])

    @property
    def segments(self) -> list[tuple[int, int]]:
        """First token of each segment, and the one behind its last."""
        return list(zip(self.points, (*self.points[1:], self.length), strict=True))

    @property
    def advantages_J(self) -> Floats:
        """Measured advantage of every segment; NaN beside a value that could not be measured."""
        return np.diff(np.append(self.values_J, self.reward))

    @property
    def advantage_errors_J(self) -> Floats:
        """Standard error of every advantage; the reward at the end has none."""
        errors = np.append(self.errors_J, 0.0)
        found: Floats = np.hypot(errors[1:], errors[:-1])
        return found

    def of_tokens(self) -> Floats:
        """The advantage of every token, that of its segment; NaN where that is not known."""
        found = np.full(self.length, math.nan)
        for (begin, end), advantage in zip(self.segments, self.advantages_J, strict=True):
            found[begin:end] = advantage
        return found

    def half(self, which: int) -> Measured:
        """Every second continuation of each branch, from the first or from the second."""
        halves = tuple(each[which::2] for each in self.rewards)
        return Measured(self.points, self.length, self.reward, halves, self.span)


def standard_error(rewards: Sequence[float], span: tuple[float, float]) -> float:
    """Standard error of a mean of K rewards, NaN for K = 0.

    Half a reward of each end of the span is added before the deviation is taken, as Jeffreys' prior
    does for rewards of 0 and 1. So K rewards that are all alike, or one alone, do not look sure.
    """
    count = len(rewards)
    if count == 0:
        return math.nan
    low, high = span
    mean = (sum(rewards) + (low + high) / 2) / (count + 1)
    square = (sum(r * r for r in rewards) + (low * low + high * high) / 2) / (count + 1)
    return math.sqrt(max(0.0, square - mean * mean) / count)
