"""Credit that a group gives its own tokens, without another forward pass.

    prefix_values  what the reward of the group does at each token of its prefix trie (TEMPO)
    key_tokens     which tokens go with right answers, by statistics of the group (KTAE)

Both are nothing where all rewards of a group are equal.

Legend: G completions of one group, B completions of the step, N all their tokens.
Evidence: [P] paper or official code, [3P] third parties, [D] derived, [I] inferred.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from learner.algorithm.prefix_sets import shared_prefixes


def prefix_steps(token_ids: Sequence[Sequence[int]], rewards: Sequence[float]) -> list[float]:
    """V(o_<=t) - V(o_<t) of every token of ONE group, its completions back to back [P].

    V of a prefix is the mean reward of the completions that share it, so V of the empty one is the
    group's. Over a completion the differences add up to R_i less that mean, if no other one
    begins with all of it.
    """
    starts = [0]
    for ids in token_ids:
        starts.append(starts[-1] + len(ids))
    steps = [0.0] * starts[-1]
    for depth, members, branches in shared_prefixes(token_ids):
        before = math.fsum(rewards[m] for m in members) / len(members)
        for branch in branches:
            step = math.fsum(rewards[m] for m in branch) / len(branch) - before
            for member in branch:
                steps[starts[member] + depth] = step
    return steps


def key_values(token_ids: Sequence[Sequence[int]], right: Sequence[bool]) -> list[float]:
    """How far every token of ONE group goes with right answers, in (-1, 1) [P].

    Of a token, a right and b wrong completions have it, and n+ and n- are all of them:
    tanh((F + IG) x / 4), F = exp(-2 p) of Fisher's exact test (0 for p = 1), IG the information
    that having it gives of being right, in bits, and x = asin sqrt(a / n+) - asin sqrt(b / n-).
    The last token of a completion has 0: it mostly ends the text (the paper leaves EOS out) [I].
    """
    wins = sum(right)
    losses = len(right) - wins
    if not wins or not losses:
        return [0.0 for ids in token_ids for _ in ids]
    having: tuple[Counter[int], Counter[int]] = (Counter(), Counter())
    for ids, good in zip(token_ids, right, strict=True):
        having[good].update(set(ids))
    keys: dict[tuple[int, int], float] = {}
    for token in having[0].keys() | having[1].keys():
        pair = having[1][token], having[0][token]
        if pair not in keys:
            keys[pair] = _key(*pair, wins, losses)
    return [
        0.0 if place == len(ids) - 1 else keys[having[1][token], having[0][token]]
        for ids in token_ids
        for place, token in enumerate(ids)
    ]


def _key(a: int, b: int, wins: int, losses: int) -> float:
    p = fisher(a, b, wins - a, losses - b)
    strength = 0.0 if p >= 1 else math.exp(-2 * p)
    total, having = wins + losses, a + b
    left = total - having
    gain = _entropy(wins, total)
    gain -= having / total * _entropy(a, having) + left / total * _entropy(wins - a, left)
    direction = math.asin(math.sqrt(a / wins)) - math.asin(math.sqrt(b / losses))
    return math.tanh((strength + gain) * direction / 4)


def _entropy(some: int, total: int) -> float:
    """Entropy of a coin that shows `some` of `total`, in bits."""
    if some in (0, total):
        return 0.0
    share = some / total
    return -share * math.log2(share) - (1 - share) * math.log2(1 - share)


def fisher(a: int, b: int, c: int, d: int) -> float:
    """Two-sided p of Fisher's exact test of the table [[a, b], [c, d]]."""
    rows, columns, total = a + b, a + c, a + b + c + d
    ways = [
        math.comb(columns, k) * math.comb(total - columns, rows - k)
        for k in range(max(0, rows + columns - total), min(rows, columns) + 1)
    ]
    here = math.comb(columns, a) * math.comb(total - columns, b)
    return sum(way for way in ways if way <= here) / sum(ways)
