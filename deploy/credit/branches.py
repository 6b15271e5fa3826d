"""The rules of `--at`, which say where completions are branched: `common.branch_points`."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace

from common.branch_points import BranchRules
from common.errors import UserError


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
        if word == "sentences":
            return replace(rules, sentences=True)
        if word == "turns":
            return replace(rules, turns=True)
        if name == "every" and int(number) >= 1:
            return replace(rules, every=int(number))
        if name == "below" and 0 < float(number) <= 1:
            return replace(rules, below=float(number))
    raise UserError(
        f"--at {word}: give turns, sentences, every:N (N from 1), below:P (P above 0, up to 1) or "
        "start, the beginning alone"
    )
