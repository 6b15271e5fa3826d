"""What samples of a suite add up to. Pure functions of numpy arrays.

Legend: P problems, N samples a problem, K samples that a metric is about (K <= N), M metrics,
B resamples of the bootstrap.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

RESAMPLES = 10_000
CONFIDENCE = 0.95
_CHUNK = 500  # resamples drawn at a time: P * 500 counts are a few MiB


@dataclass(frozen=True)
class Estimate:
    """A mean over problems and its bootstrap interval."""

    value: float
    low: float
    high: float


def avg_at_n(correct_PN: npt.NDArray[np.bool_]) -> Floats:
    """[P] share of right samples: avg@N, which estimates pass@1 without bias."""
    return correct_PN.mean(axis=1, dtype=np.float64)


def pass_at_k(num_samples: int, num_correct_P: npt.ArrayLike, k: int) -> Floats:
    """[P] the chance that at least one of `k` samples is right, estimated from N of them.

    The unbiased estimator 1 - C(N - c, k) / C(N, k) of Chen et al. 2021 (arXiv 2107.03374,
    equation 1), c being the number of right samples. The ratio is the product over j < k of
    (N - c - j) / (N - j), whose factors lie in [0, 1]: no binomial is ever formed.

    Raises: `ValueError` unless 1 <= k <= N and 0 <= c <= N.
    """
    correct_P = np.asarray(num_correct_P, np.int64)
    if not 1 <= k <= num_samples:
        raise ValueError(f"pass@{k} of {num_samples} samples: k must lie in 1..{num_samples}")
    if correct_P.size and not 0 <= correct_P.min() <= correct_P.max() <= num_samples:
        raise ValueError(f"the numbers of right samples must lie in 0..{num_samples}")
    drawn_K = np.arange(k)
    left_PK = np.maximum(num_samples - correct_P[:, None] - drawn_K, 0)
    all_wrong_P = np.prod(left_PK / (num_samples - drawn_K), axis=1)
    return np.asarray(1.0 - all_wrong_P, np.float64)


def majority(answers_N: Sequence[str | None], correct_N: Sequence[bool]) -> float:
    """Majority vote, maj@N of one problem: the expected mark of the commonest answer.

    Ties are shared: among the answers with the most votes one is drawn at random, and the mark is
    the expectation over that draw (self-consistency, Wang et al. 2022, arXiv 2203.11171, leaves
    ties open). A sample without an answer (None) has no vote; without any vote the mark is 0.
    Answers that are one answer to the voter may have got different verdicts; such a class is
    marked by the share of its samples that are right.
    """
    votes: dict[str, list[bool]] = {}
    for answer, right in zip(answers_N, correct_N, strict=True):
        if answer is not None:
            votes.setdefault(answer, []).append(right)
    if not votes:
        return 0.0
    most = max(map(len, votes.values()))
    winners = [marks for marks in votes.values() if len(marks) == most]
    return sum(sum(marks) / most for marks in winners) / len(winners)


def bootstrap(
    values_MP: npt.ArrayLike,
    seed: int,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
) -> list[Estimate]:
    """Means over problems with percentile intervals (Efron and Tibshirani 1993, chapter 13).

    Problems are drawn with replacement, and all M metrics see the same B draws. Samples within a
    problem are not drawn again: the interval says how much another set of problems of this kind
    would change the mean, the noise of sampling included as far as it differs by problem.
    A draw is the count of each problem in it, which is multinomial.

    Raises: `ValueError` without problems, or where a value is not finite.
    """
    values_MP = np.asarray(values_MP, np.float64)
    num_metrics, num_problems = values_MP.shape
    if num_problems == 0 or not np.isfinite(values_MP).all():
        raise ValueError("a bootstrap needs at least one problem, and finite values")
    random = np.random.default_rng(seed)
    even_P = np.full(num_problems, 1.0 / num_problems)
    means_MB = np.empty((num_metrics, resamples))
    for start in range(0, resamples, _CHUNK):
        stop = min(start + _CHUNK, resamples)
        counts_BP = random.multinomial(num_problems, even_P, size=stop - start)
        means_MB[:, start:stop] = values_MP @ counts_BP.T / num_problems
    tail = (1.0 - confidence) / 2.0
    low_M, high_M = np.quantile(means_MB, [tail, 1.0 - tail], axis=1)
    return [
        Estimate(float(mean), float(low), float(high))
        for mean, low, high in zip(values_MP.mean(axis=1), low_M, high_M, strict=True)
    ]


def powers_of_two(limit: int) -> list[int]:
    """1, 2, 4, ... below `limit`, and `limit`: the k of pass@k."""
    return [*(2**i for i in range(limit.bit_length()) if 2**i < limit), limit]
