"""Where a completion is branched: before the tokens at which its value is measured.

A branch at t goes on from the prompt and the first t tokens. The first is always at 0. Two
neighbours bound a *segment*, and the last segment goes to the end of the completion.

Branches stand before tokens of the policy alone, never inside of what an environment said. So an
observation belongs to the segment that brought it about.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from common.errors import UserError

_SENTENCE_ENDS = (".", "!", "?", ";")


@dataclass(frozen=True)
class BranchRules:
    """Which tokens are branched at; several rules add up."""

    sentences: bool = False
    """Behind the end of a sentence or a line."""
    every: int | None = None
    """Before every n-th token of the policy."""
    below: float | None = None
    """Before tokens of a lower probability."""
    most: int = 12
    """Branches of a completion at most, those left evenly spread."""
    turns: bool = False
    """Behind the end of a turn, and what the environment said to it."""


def parse_rules(words: Sequence[str], most: int) -> BranchRules:
    """The rules that `--at` names: `turns`, `sentences`, `every:8`, `below:0.2`, `start`.

    Raises: `UserError` for another word, and a number that cannot be.
    """
    if most < 1:
        raise UserError(f"--points {most} must be at least 1: the start of a completion is one")
    found = BranchRules(most=most)
    for word in words:
        found = _with_rule(found, word)
    return found


def _with_rule(rules: BranchRules, word: str) -> BranchRules:
    name, _, number = word.partition(":")
    with contextlib.suppress(ValueError):
        if word == "start":
            return rules
        if word in ("sentences", "turns"):
            return replace(rules, **{word: True})
        if name == "every" and int(number) >= 1:
            return replace(rules, every=int(number))
        if name == "below" and 0 < float(number) <= 1:
            return replace(rules, below=float(number))
    raise UserError(
        f"--at {word}: give turns, sentences, every:N (N from 1), below:P (P above 0, up to 1) or "
        "start, the beginning alone"
    )


def branch_points(
    texts: Sequence[str], logprobs: Sequence[float], rules: BranchRules, first: int = 0
) -> list[int]:
    """Branches of a completion, ascending, without its end.

    Args:
        texts: of each token. logprobs: of each token, nats; NaN where it was given.
        first: tokens at the start that were given: the first branch is behind them.
    """
    found, said = set(), 0  # of the policy's tokens, behind the first
    for t in range(first + 1, len(texts)):
        if math.isnan(logprobs[t]):
            continue
        said += 1
        before, begins = texts[t - 1].rstrip(" "), math.isnan(logprobs[t - 1])
        ends = before.endswith(_SENTENCE_ENDS) or "\n" in before
        if (rules.turns and begins) or (rules.sentences and ends and not begins):
            found.add(t)
        if rules.every is not None and said % rules.every == 0:
            found.add(t)
        if rules.below is not None and logprobs[t] < math.log(rules.below):
            found.add(t)
    return [first, *_spread(sorted(found), rules.most - 1)]


def _spread(places: list[int], most: int) -> list[int]:
    """At most `most` of the places, evenly spread over them."""
    if len(places) <= most:
        return places
    return [places[(2 * i + 1) * len(places) // (2 * most)] for i in range(most)]
