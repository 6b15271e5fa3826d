"""The generation loop between a scripted source, generators, verifiers and log."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

from made_up_groups import receipt

from actors.data.prompts import Prompt
from actors.rollout.episodes import Episodes, GroupSampling
from actors.rollout.group_book import GroupBook
from actors.rollout.guidance import Guidance
from actors.rollout.loop import RolloutLoop
from actors.rollout.resume import RolloutState
from common.config.load import load_config
from common.config.sections import Config
from common.record.ledger import Ledger
from common.record.writer import TrajectoryLogClient
from common.supervision.calls import Handle
from common.supervision.waits import Waits
from common.trajectory import GroupReceipt, GroupRequest

PARTS = {"kept": 2, "filtered": 2, "cut short": 1, "nothing": 0}
"""Batches of each kind of group; a batch is a completion."""


class Source:
    def next(self) -> Prompt:
        return Prompt(0, "p", 0, 0, "?", "?", [1], "{}", None, None)

    def encode(self, solution: str) -> list[int]:
        """A letter is a token."""
        return [ord(letter) for letter in solution]


class Generators:
    """Groups of one kind first, then groups that never end."""

    version = 0

    def __init__(self, kind: str) -> None:
        self.kind = kind

    async def generate(self, request: GroupRequest, deadline_s: float) -> AsyncIterator[str]:
        if request.group_id > 0:
            await asyncio.sleep(60.0)
        for part in range(PARTS[self.kind]):
            yield f"{self.kind} {part}"


class Verifiers:
    async def score(self, group_id: int, rollout_ref: str, deadline_s: float) -> str:
        return rollout_ref


class Append:
    """`TrajectoryLogWriter.append`: what it was given, and a receipt for it."""

    def __init__(self) -> None:
        self.logged: list[list[str]] = []

    async def remote(self, sizes: list[int], *refs: str) -> list[GroupReceipt]:
        parts = iter(refs)
        groups = [list(islice(parts, size)) for size in sizes]
        self.logged += groups
        return [self.receipt_of(group) for group in groups]

    def receipt_of(self, refs: list[str]) -> GroupReceipt:
        equal = refs[0].startswith("filtered")
        return replace(receipt(0, 0, 0), num_completions=len(refs), rewards_equal=equal)


class Writer:
    def __init__(self) -> None:
        self.append = Append()


@lru_cache
def config_with(*overrides: str) -> Config:
    keys = [
        "model.path=none",
        "batch.prompts_per_step=1",
        "batch.group_size=2",
        "generator.max_staleness=0",
        "algorithm.rollout.dynamic_sampling=true",
    ]
    return load_config([], [*keys, *overrides])


@dataclass(frozen=True)
class Rollout:
    """The loop and what it works on."""

    loop: RolloutLoop
    state: RolloutState

    @property
    def book(self) -> GroupBook:
        return self.state.book

    def counts(self) -> tuple[float, ...]:
        names = ("groups/dispatched", "groups/filtered", "groups/abandoned")
        return tuple(self.book.metrics()[name] for name in names)


def rollout_of(
    source: Any,
    writer: Any,
    verifiers: Any,
    generators: Any,
    *overrides: str,
    ledger: Ledger | None = None,
    announce: Callable[[GroupReceipt], None] | None = None,
) -> Rollout:
    config = config_with(*overrides)
    staleness, follow_up = config.generator.max_staleness, config.algorithm.rollout.follow_up
    log = TrajectoryLogClient(Handle(writer), Waits(), 10.0)
    guidance = Guidance(config.algorithm.rollout.guidance, 1, 7)
    book = GroupBook(
        ledger or Ledger(Path(":memory:"), "prompts of the test"),
        Waits(),
        max_staleness=staleness,
        groups_per_step=config.groups_per_step,
        dynamic_sampling=config.algorithm.rollout.dynamic_sampling,
        announce=announce,
    )
    loop = RolloutLoop(
        source=source,
        episodes=Episodes(generators, verifiers, sample_timeout_s=60.0, judge_timeout_s=60.0),
        book=book,
        log=log,
        guidance=guidance,
        sampling=GroupSampling(
            config.batch.group_size,
            8,
            1.0,
            follow_up=None if follow_up.kind == "none" else follow_up,
            group_size=config.batch.group_size,
        ),
        seed=5 if staleness == 0 else None,
    )
    return Rollout(
        loop,
        RolloutState(source, book, guidance, log, config.batch.group_size, follow_up),
    )
