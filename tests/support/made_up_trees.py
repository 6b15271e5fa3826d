"""Random trees as nested nodes, and as the completions that a group has of them."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from learner_models import trajectories

from common.record.parts import JOINS
from common.record.turns import turn


@dataclass
class Node:
    """The prompt, or some tokens behind it; a leaf has a reward."""

    ids: list[int]
    children: list[Node] = field(default_factory=list)
    reward: float | None = None


@dataclass(frozen=True)
class Row:
    """A completion of the tree: the way to a leaf from where it was given the tokens of another."""

    ids: list[int]
    given: int
    parent: int
    reward: float
    way: tuple[Node, ...]
    """Its nodes from the prompt's child on, those that it was given included."""


def random_tree(random: np.random.Generator, children: Sequence[int], every: int = 3) -> Node:
    """A tree in which some completions end before the last level."""

    def grow(level: int, ids: list[int]) -> Node:
        if level == len(children) or (level and random.random() < 0.3):
            return Node(ids, reward=float(random.integers(0, 3)) / 2)
        last = level + 1 == len(children)
        below = []
        for _ in range(children[level]):
            length = int(random.integers(1, 2 * every)) if last else every
            below.append(grow(level + 1, random.integers(3, 90, length).tolist()))
        return Node(ids, below)

    return grow(0, [])


def rows_of(root: Node) -> list[Row]:
    """The completions, parents before what goes on from them: first children follow each other."""
    found: list[Row] = []
    waiting = deque((child, (child,), 0, -1) for child in root.children)
    while waiting:
        node, way, given, parent = waiting.popleft()
        length = sum(len(one.ids) for one in way)
        while node.children:
            first, *others = node.children
            waiting.extend((other, (*way, other), length, len(found)) for other in others)
            node, way = first, (*way, first)
            length += len(first.ids)
        assert node.reward is not None
        ids = [token for one in way for token in one.ids]
        found.append(Row(ids, given, parent, node.reward, way))
    return found


def values_of(root: Node) -> dict[int, tuple[float, float]]:
    """Value of every node and deviation of its children's values, by `id`: SPO's recursion.

    AIFrameResearch/SPO b9fc6a2, hybrid_inference_strategy.py:383-416.
    """
    found: dict[int, tuple[float, float]] = {}

    def dfs(node: Node) -> float:
        values = [dfs(child) for child in node.children]
        value = float(np.mean(values)) if values else float(node.reward or 0.0)
        found[id(node)] = value, float(np.std(values)) if values else 0.0
        return value

    dfs(root)
    return found


def edges_of(root: Node) -> Iterator[tuple[Node, Node, tuple[Node, ...]]]:
    """(parent, child, the way to the parent from the prompt on) of every edge."""

    def dfs(node: Node, way: tuple[Node, ...]) -> Iterator[tuple[Node, Node, tuple[Node, ...]]]:
        for child in node.children:
            yield node, child, (*way, node)
            yield from dfs(child, (*way, node))

    yield from dfs(root, ())


def trees(seed: int, count: int = 3) -> list[Node]:
    """Trees of two and three levels."""
    random = np.random.default_rng(seed)
    return [random_tree(random, children) for children in [(3, 2, 2), (2, 3), (4, 2)][:count]]


def batches(roots: list[Node], **changes: Any) -> list[pa.RecordBatch]:
    """Groups of trees as the log has them, behind prompts of their own."""
    made = []
    for number, root in enumerate(roots):
        rows = rows_of(root)
        (plain,) = trajectories([(4 + number, [len(row.ids) for row in rows])], seed=number)
        records = []
        for index, (record, row) in enumerate(zip(plain.to_pylist(), rows, strict=True)):
            count, given = len(row.ids), row.given
            records.append(
                record
                | {
                    "completion_index": index,
                    "token_ids": row.ids,
                    "behaviour_logprobs": [math.nan] * given + [-1.0] * (count - given),
                    "loss_mask": [False] * given + [True] * (count - given),
                    "guidance_length": given,
                    "turns": [turn(given, count, "stop")],
                    "continues": row.parent,
                    "part": JOINS if row.parent >= 0 else "",
                    "reward": row.reward,
                }
                | changes
            )
        made.append(pa.RecordBatch.from_pylist(records, schema=plain.schema))
    return made
