"""Which of several data sets a ticket takes its prompt from: a pure function of the ticket.

The weights become small whole numbers, and a *round* has as many tickets as these add up to. Every
round is the same: a data set of weight c stands in it c times, spread evenly. So every stretch of
tickets has the data sets in nearly their proportions, and a ticket is found without its history.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

_FINEST = 1000
"""Tickets of the largest data set in a round, at most."""


class Mixture:
    """Tickets of data sets with `weights`, each above 0."""

    def __init__(self, weights: Sequence[float]) -> None:
        self.counts = _whole(weights)
        places = [
            (Fraction(2 * nth + 1, 2 * count), which, nth)
            for which, count in enumerate(self.counts)
            for nth in range(count)
        ]
        self._round = [(which, nth) for _, which, nth in sorted(places)]

    def at(self, ticket: int) -> tuple[int, int]:
        """The data set of a ticket, and how many tickets before it had the same."""
        rounds, place = divmod(ticket, len(self._round))
        which, nth = self._round[place]
        return which, rounds * self.counts[which] + nth


def _whole(weights: Sequence[float]) -> list[int]:
    """Whole numbers in the proportions of `weights`; rounded where exact ones are too large."""
    exact = [Fraction(str(weight)) for weight in weights]
    common = math.lcm(*(weight.denominator for weight in exact))
    counts = [int(weight * common) for weight in exact]
    divisor = math.gcd(*counts)
    if max(counts) // divisor > _FINEST:
        counts = [max(1, round(_FINEST * weight / max(exact))) for weight in exact]
        divisor = math.gcd(*counts)
    return [count // divisor for count in counts]
