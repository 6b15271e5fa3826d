"""How far a rule's credit agrees with measured advantages, segment by segment.

    rank     Spearman's correlation over all segments
    sign     share of the segments of a credit and an advantage other than 0 that have one sign
    ceiling  what noise allows: the correlation that the measured advantages would have with the
             true ones, from the correlation of their halves (Spearman and Brown)

Intervals are of 95 %, by drawing whole completions anew: segments of one are not independent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from deploy.credit.measured import Floats, Measured
from deploy.eval.metrics import Estimate

_DRAWS = 1000


@dataclass(frozen=True)
class Agreement:
    """How far one rule agrees with what was measured."""

    segments: int
    rank: Estimate
    sign: Estimate


def credit_of_segments(advantages_T: Floats | None, measured: Measured) -> Floats:
    """Mean credit of the trained tokens of each segment; 0 where none was trained."""
    if advantages_T is None:
        return np.zeros(len(measured.points))
    parts = [advantages_T[begin:end] for begin, end in measured.segments]
    return np.array([np.nanmean(p) if np.isfinite(p).any() else 0.0 for p in parts])


def agreement(credits: Sequence[Floats], measured: Sequence[Measured], seed: int = 0) -> Agreement:
    """How far the credit of each completion's segments agrees with what was measured of them."""
    pairs = [(credit, each.advantages_J) for credit, each in zip(credits, measured, strict=True)]
    kept = [(c[a_ok], a[a_ok]) for c, a in pairs if (a_ok := np.isfinite(a)).any()]
    return Agreement(
        sum(len(a) for _, a in kept),
        _drawn(kept, rank_correlation, seed),
        _drawn(kept, same_sign, seed),
    )


def ceiling(measured: Sequence[Measured], seed: int = 0) -> Estimate:
    """The largest rank correlation that a perfect rule could show, given K."""
    pairs = [(each.half(0).advantages_J, each.half(1).advantages_J) for each in measured]
    kept = [(a[ok], b[ok]) for a, b in pairs if (ok := np.isfinite(a) & np.isfinite(b)).any()]
    return of_all_samples(_drawn(kept, rank_correlation, seed))


def of_all_samples(halves: Estimate) -> Estimate:
    """`from_halves` of an estimate and of the ends of its interval."""
    return Estimate(*(from_halves(each) for each in (halves.value, halves.low, halves.high)))


def from_halves(half: float) -> float:
    """The correlation of all samples with the truth, sqrt(2 r / (1 + r)), from that of halves."""
    if not half > 0:
        return math.nan if math.isnan(half) else 0.0
    return math.sqrt(2 * half / (1 + half))


def rank_correlation(one: Floats, other: Floats) -> float:
    """Spearman's, ties at their mean rank; NaN where one of the two is constant."""
    a, b = _ranks(one), _ranks(other)
    a, b = a - a.mean(), b - b.mean()
    size = math.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / size if size else math.nan


def same_sign(credit: Floats, advantage: Floats) -> float:
    """Share of equal signs among pairs without a 0; NaN without any."""
    some = (credit != 0) & (advantage != 0)
    return float((np.sign(credit) == np.sign(advantage))[some].mean()) if some.any() else math.nan


def _ranks(values: Floats) -> Floats:
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    ranks: Floats = (last - (count - 1) / 2)[place]
    return ranks


def _drawn(
    pairs: Sequence[tuple[Floats, Floats]], score: Callable[[Floats, Floats], float], seed: int
) -> Estimate:
    """The score over all pairs, with an interval over completions drawn anew."""
    if not pairs:
        return Estimate(math.nan, math.nan, math.nan)

    def of(chosen: Sequence[int] | npt.NDArray[np.int64]) -> float:
        return score(*(np.concatenate([pairs[i][side] for i in chosen]) for side in (0, 1)))

    random = np.random.default_rng(seed)
    draws = [of(random.integers(len(pairs), size=len(pairs))) for _ in range(_DRAWS)]
    known = [each for each in draws if not math.isnan(each)]
    whole = of(range(len(pairs)))
    if len(pairs) < 2 or not known:
        return Estimate(whole, math.nan, math.nan)
    low, high = np.quantile(known, [0.025, 0.975])
    return Estimate(whole, float(low), float(high))
