"""What becomes of a group: trained on, filtered or abandoned; the slot of a dropped one is free."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest
from test_budget import receipt

from actors.guidance import Guidance
from actors.prompts import Prompt
from actors.rollout import RolloutLoop
from common.config_loader import load_config
from common.trajectory import GroupReceipt, GroupRequest
from common.waits import Waits

PARTS = {"kept": 2, "filtered": 2, "cut short": 1, "nothing": 0}
"""Batches of each kind of group; a batch is a completion."""


class Source:
    def next(self) -> Prompt:
        return Prompt("p", 0, 0, "?", [1], "{}", None, None)


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
    """The stream's one method: what it was given, and a receipt for it."""

    def __init__(self) -> None:
        self.logged: list[list[str]] = []

    async def remote(self, refs: list[str]) -> GroupReceipt:
        self.logged.append(refs)
        equal = refs[0].startswith("filtered")
        return replace(receipt(0, 0, 0), num_completions=len(refs), rewards_equal=equal)


class Stream:
    def __init__(self) -> None:
        self.append = Append()


async def after_the_first_group(kind: str) -> tuple[RolloutLoop, Stream]:
    config = load_config(
        [],
        [
            "model.path=none",
            "batch.prompts_per_step=1",
            "batch.group_size=2",
            "generator.max_staleness=0",
            "algorithm.rollout.dynamic_sampling=true",
        ],
    )
    stream = Stream()
    parts: dict[str, Any] = {"source": Source(), "stream": stream, "verifiers": Verifiers()}
    loop = RolloutLoop(
        config,
        **parts,
        generators=Generators(kind),  # type: ignore[arg-type]
        guidance=Guidance(config.algorithm.rollout.guidance, 1),
        first_group_id=0,
        waits=Waits(),
    )
    running = asyncio.create_task(loop.run())
    for _ in range(50):
        await asyncio.sleep(0)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    return loop, stream


@pytest.mark.parametrize(
    ("kind", "counts", "status"),
    [
        ("kept", (1, 0, 0), "0 groups under way, 1 ready, 1/1 slots"),
        ("filtered", (2, 1, 0), "1 groups under way, 0 ready, 1/1 slots"),
        ("cut short", (2, 0, 1), "1 groups under way, 0 ready, 1/1 slots"),
        ("nothing", (2, 0, 1), "1 groups under way, 0 ready, 1/1 slots"),
    ],
)
def test_a_dropped_group_makes_room_for_another(
    kind: str, counts: tuple[int, int, int], status: str
) -> None:
    loop, stream = asyncio.run(after_the_first_group(kind))
    found = loop.counts
    assert (found.groups_dispatched, found.groups_filtered, found.groups_abandoned) == counts
    assert loop.status() == status
    # Everything that was sampled is in the log, of dropped groups too.
    parts = [f"{kind} {part}" for part in range(PARTS[kind])]
    assert stream.append.logged == ([parts] if parts else [])
    assert found.tokens_generated == (10 if parts else 0)
