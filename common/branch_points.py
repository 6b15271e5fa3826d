"""Where a completion is branched: before the tokens at which its value is measured.

A branch at t goes on from the prompt and the first t tokens. The first is always at the start. Two
neighbours bound a *segment*, and the last segment goes to the end of the completion.

Branches stand before tokens of the policy alone, never inside of what an environment said. So an
observation belongs to the segment that brought it about.

`algorithm.rollout.follow_up` chooses by this in training, and `grpo-lambda credit` afterwards. Each
has rules of its own, and its own way to choose where there are too many places.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

_SENTENCE_ENDS = (".", "!", "?", ";")


@dataclass(frozen=True)
class BranchRules:
    """Which tokens are branched at; several rules add up."""

    turns: bool = False
    """Behind the end of a turn, and what the environment said to it."""
    sentences: bool = False
    """Behind the end of a sentence or a line."""
    separator: str | None = None
    """Behind a token that has this text."""
    every: int | None = None
    """Before every n-th token of the policy."""
    below: float | None = None
    """Before tokens of a lower probability."""
    nth_below: int = 1
    """Every n-th of the unlikely tokens. One at the start counts, though it is a branch anyway."""
    most: int = 12
    """Branches of a completion at most, that at its start included."""
    kept: Literal["ends", "middles"] = "middles"
    """Which places are kept of too many. `ends`: the first and the last, and others evenly between
    them. `middles`: the start, and the middle of each of as many equal parts of the others."""


def branch_points(
    text_of: Callable[[int], str],
    logprobs: Sequence[float],
    rules: BranchRules,
    *,
    first: int = 0,
    may_be: Callable[[int], bool] = lambda t: True,
) -> list[int]:
    """Branches of a completion, ascending, without its end.

    Args:
        text_of: token number -> its text; asked for by the rules on texts alone.
        logprobs: of each token, nats; NaN where it was given.
        first: tokens at the start that were given: the first branch is behind them.
        may_be: whether there may be a branch at t; asked of the places that the rules found.
    """
    sampled = [t for t in range(first + 1, len(logprobs)) if not math.isnan(logprobs[t])]
    found = set[int]()
    for t in sampled:
        if math.isnan(logprobs[t - 1]):
            found |= {t} if rules.turns else set()
        elif _is_behind_an_end(text_of, t, rules):
            found.add(t)
    if rules.every is not None:
        found.update(sampled[rules.every - 1 :: rules.every])
    if rules.below is not None:
        least = math.log(rules.below)
        unsure = [t for t in range(first, len(logprobs)) if logprobs[t] < least]
        found.update(unsure[rules.nth_below - 1 :: rules.nth_below])
    places = [t for t in sorted(found) if t > first and may_be(t)]
    if rules.kept == "ends":
        return _with_ends([first, *places], rules.most)
    return [first, *_middles(places, rules.most - 1)]


def _is_behind_an_end(text_of: Callable[[int], str], t: int, rules: BranchRules) -> bool:
    """Whether the token before t ends what the rules name."""
    if rules.separator is not None and rules.separator in text_of(t - 1):
        return True
    if not rules.sentences:
        return False
    before = text_of(t - 1).rstrip(" ")
    return before.endswith(_SENTENCE_ENDS) or "\n" in before


def _with_ends(places: list[int], most: int) -> list[int]:
    """At most `most` of the places, the first and the last among them; one alone is the first."""
    last = len(places) - 1
    if last < most:
        return places
    return sorted({places[round(i * last / max(1, most - 1))] for i in range(most)})


def _middles(places: list[int], most: int) -> list[int]:
    """At most `most` of the places, the middle of each of as many equal parts of them."""
    if len(places) <= most:
        return places
    return [places[(2 * i + 1) * len(places) // (2 * most)] for i in range(most)]
