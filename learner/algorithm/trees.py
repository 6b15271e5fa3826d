"""Advantages from a group that is a tree: what the value of a node gains over that of its parent.

Some completions of a group were given the first tokens of another and went on from there
(`learner.algorithm.rewarded.Trees`). A completion is cut where others go on from it. A stretch
between two cuts is a *node*, the prompt is the root, and a node whose completion ends in it is a
leaf:

    V(leaf) = R,   V(node) = mean over its children of V       arXiv 2505.23564, official code [P]
    A(token) = V(its node) - V(the parent of its node)

V is the mean of the rewards below it where all nodes of a level have as many leaves. Where a
completion ends before the last level, its parent's mean is over children, not over leaves [P].

    the advantages along the path of a leaf add up to R - V(root)      [D]
    a group that no completion goes on in has R - mean R               [D]

Every token is in the loss once, in the completion that it was sampled in: given tokens are masked.

Legend: B completions, N all tokens. Evidence: [P] paper, [D] derived.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch

from common.config.algorithm import AdvantageConfig
from common.config.bounds import PositiveShare
from learner.algorithm.advantage_inputs import AdvantageInputs, TokenAdvantages, without_sure
from learner.algorithm.gae import whitened

_EPSILON = 1e-8
"""What the official code adds to a deviation [P]."""


def tree_values(
    inputs: AdvantageInputs,
    config: AdvantageConfig,
    *,
    divide: Literal["none", "deviation"] = "none",
    zero_above: PositiveShare = 1.0,
    drop: bool = True,
    whiten: bool = False,
) -> TokenAdvantages:
    """V(node) - V(parent) for the tokens of every node, SPO's tree [P].

    `divide=deviation` divides by the population deviation of the values of the parent's children
    plus 1e-8 (there `grpo`, here the default is `rloo`) [P]. Tokens that were sampled with a
    probability above `zero_above` get nothing [P]. With `drop` a token of advantage 0 is in no
    denominator either, as edges of advantage 0 and sure tokens are left out there [P]. `whiten`
    then makes mean 0 and deviation 1 of those that are left. A completion without a reward is in no
    value, and one that only such go on from has none.
    """
    tokens, axis = inputs.tokens, inputs.tokens.axis
    advantages_N = torch.zeros(len(tokens.token_ids_N), dtype=torch.float64)
    parts = advantages_N.split(axis.lengths_B.tolist())  # views, a completion each
    for group in inputs.group_B.unique().tolist():
        members = (inputs.group_B == group).nonzero()[:, 0].tolist()
        for completion, begin, end, gain in _gains(_chains(inputs, members), divide):
            parts[completion][begin:end] = gain
    advantages_N = without_sure(advantages_N, tokens, zero_above)
    kept_N = axis.spread(inputs.kept_B) & tokens.loss_mask_N
    counted_N = (advantages_N != 0) & kept_N
    if whiten:
        advantages_N = whitened(advantages_N, counted_N if drop else kept_N)
    return TokenAdvantages(advantages_N, counted_N=counted_N if drop else None)


class Gain(NamedTuple):
    """The tokens [begin, end) of a completion, which are a node, and their advantage."""

    completion: int
    begin: int
    end: int
    gain: float


@dataclass
class _Chain:
    """A completion, as a way from where it begins down to a leaf."""

    completion: int
    parent: int
    begin: int
    """Tokens that it was given."""
    length: int
    reward: float | None
    joined: dict[int, list[int]] = field(default_factory=lambda: defaultdict(list))
    """Completions that go on from it, by the number of its tokens that they were given."""

    @property
    def edges(self) -> list[int]:
        """Where its nodes begin, and where its leaf ends."""
        return [*sorted({self.begin, *self.joined}), self.length]


def _chains(inputs: AdvantageInputs, members: Sequence[int]) -> dict[int, _Chain]:
    """The completions of a group, in their order."""
    trees, lengths = inputs.tokens.trees, inputs.tokens.axis.lengths_B
    found: dict[int, _Chain] = {}
    for one in members:
        parent = -1 if trees is None else int(trees.parent_B[one])
        begin = 0 if trees is None or parent < 0 else int(trees.given_B[one])
        reward = float(inputs.rewards_B[one])
        found[one] = _Chain(
            one, parent, begin, int(lengths[one]), None if math.isnan(reward) else reward
        )
        if parent >= 0:
            found[parent].joined[begin].append(one)
    return found


def _gains(chains: dict[int, _Chain], divide: str) -> list[Gain]:
    """The advantage of every node that has one."""
    nodes: list[tuple[int, int, int, float | None]] = []  # completion, begin, end, value
    firsts: dict[int, float | None] = {}  # the value of each completion's first node
    splits: dict[tuple[int, int], tuple[float | None, float]] = {}
    for chain in reversed(chains.values()):  # who goes on from it stands behind it
        value, edges = chain.reward, chain.edges
        for begin, end in zip(reversed(edges[:-1]), reversed(edges[1:]), strict=True):
            nodes.append((chain.completion, begin, end, value))
            if begin in chain.joined:
                values = [value, *(firsts[other] for other in chain.joined[begin])]
                splits[chain.completion, begin] = _split(values)
                value = splits[chain.completion, begin][0]
        firsts[chain.completion] = value
    root = _split([firsts[one] for one, chain in chains.items() if chain.parent < 0])
    found = []
    for completion, begin, end, value in nodes:
        chain = chains[completion]
        above = splits.get((completion, begin))
        if above is None:  # its first node: a child of the node that it was given, or of the root
            above = root if chain.parent < 0 else splits[chain.parent, chain.begin]
        before, deviation = above
        if value is not None and before is not None:
            scale = deviation + _EPSILON if divide == "deviation" else 1.0
            found.append(Gain(completion, begin, end, (value - before) / scale))
    return found


def _split(values: Sequence[float | None]) -> tuple[float | None, float]:
    """Mean and population deviation of what is known; exact where all are equal."""
    known = [value for value in values if value is not None]
    if not known:
        return None, 0.0
    if min(known) == max(known):
        return known[0], 0.0
    mean = math.fsum(known) / len(known)
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in known) / len(known))
