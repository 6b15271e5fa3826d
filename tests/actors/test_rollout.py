"""What becomes of a group: trained on, filtered or abandoned; the slot of a dropped one is free."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from test_budget import receipt

from actors.data.prompts import Prompt
from actors.rollout.evaluate import Evaluator
from actors.rollout.guidance import Guidance
from actors.rollout.loop import RolloutLoop
from common.config.load import load_config
from common.config.sections import Config
from common.errors import UserError, VerifierError
from common.record.ledger import Ledger
from common.record.writer import TrajectoryLogClient
from common.supervision.waits import Waits
from common.trajectory import GroupReceipt, GroupRequest

PARTS = {"kept": 2, "filtered": 2, "cut short": 1, "nothing": 0}
"""Batches of each kind of group; a batch is a completion."""


class Source:
    def next(self) -> Prompt:
        return Prompt(0, "p", 0, 0, "?", [1], "{}", None, None)


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

    async def remote(self, sizes: list[int], *refs: str) -> list[GroupReceipt]:
        parts = iter(refs)
        groups = [list(islice(parts, size)) for size in sizes]
        self.logged += groups
        return [self.receipt_of(group) for group in groups]

    def receipt_of(self, refs: list[str]) -> GroupReceipt:
        equal = refs[0].startswith("filtered")
        return replace(receipt(0, 0, 0), num_completions=len(refs), rewards_equal=equal)


class Stream:
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


def loop_of(
    source: Any,
    stream: Any,
    verifiers: Any,
    generators: Any,
    *overrides: str,
    ledger: Ledger | None = None,
    announce: Callable[[GroupReceipt], None] | None = None,
) -> RolloutLoop:
    config = config_with(*overrides)
    return RolloutLoop(
        config,
        source=source,
        log=TrajectoryLogClient(stream, Waits(), 10.0),
        verifiers=verifiers,
        generators=generators,
        guidance=Guidance(config.algorithm.rollout.guidance, 1, 7),
        ledger=ledger or Ledger(Path(":memory:"), "prompts of the test"),
        waits=Waits(),
        announce=announce,
    )


async def after_the_first_group(
    kind: str, announced: list[GroupReceipt]
) -> tuple[RolloutLoop, Stream]:
    stream = Stream()
    generators = Generators(kind)
    loop = loop_of(Source(), stream, Verifiers(), generators, announce=announced.append)
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
    announced: list[GroupReceipt] = []
    loop, stream = asyncio.run(after_the_first_group(kind, announced))
    found = loop.counts
    assert (found.groups_dispatched, found.groups_filtered, found.groups_abandoned) == counts
    assert loop.status() == status
    assert [group.group_id for group in announced] == ([0] if kind == "kept" else [])
    # Everything that was sampled is in the log, of dropped groups too.
    parts = [f"{kind} {part}" for part in range(PARTS[kind])]
    assert stream.append.logged == ([parts] if parts else [])
    assert found.tokens_generated == (10 if parts else 0)


class Unjudged(Generators):
    """Every group comes back, none with a reward."""

    async def generate(self, request: GroupRequest, deadline_s: float) -> AsyncIterator[str]:
        for part in range(2):
            yield f"{request.group_id} {part}"


class WithoutRewards(Append):
    def receipt_of(self, refs: list[str]) -> GroupReceipt:
        group = int(refs[0].split()[0])
        return replace(receipt(group, 0, 0), num_completions=2, num_unscored=2)


def test_verifiers_that_judge_nothing_end_the_run_by_name() -> None:
    class Broken(Verifiers):
        async def failures(self, deadline_s: float) -> Counter[str]:
            return Counter({"my_rule returned nan": 32, "my_rule: too slow": 1})

    stream = Stream()
    stream.append = WithoutRewards()
    loop = loop_of(Source(), stream, Broken(), Unjudged(""))
    with pytest.raises(ExceptionGroup) as raised:
        asyncio.run(asyncio.wait_for(loop.run(), 10))
    assert raised.group_contains(VerifierError, match="32 times: my_rule returned nan")
    assert loop.counts.groups_filtered == 15


class Solved(Source):
    """Worked solutions of three letters and of none; a letter is a token."""

    def __init__(self, solution: str | None) -> None:
        self.solution = solution

    def next(self) -> Prompt:
        return Prompt(0, "p", 0, 0, "?", [1], "{}", self.solution, None)

    def encode(self, solution: str) -> list[int]:
        return [ord(letter) for letter in solution]


@pytest.mark.parametrize(
    ("solution", "guidance", "guided"),
    [("abcdefghij", (97, 98, 99, 100, 101), 1), ("abc", (97, 98, 99), 1), ("", (), 0)],
)
def test_guidance_is_what_there_is_of_the_solution(
    solution: str, guidance: tuple[int, ...], guided: int
) -> None:
    keys = ("algorithm.rollout.guidance.ratio=0.5", "algorithm.rollout.guidance.max_tokens=5")
    loop = loop_of(Solved(solution), Stream(), Verifiers(), Generators("kept"), *keys)
    request = loop._dispatch(Solved(solution).next())
    assert (request.guidance_ids, request.num_guided) == (guidance, guided)


def test_a_prompt_without_a_solution_cannot_be_guided() -> None:
    keys = ("algorithm.rollout.guidance.ratio=0.5",)
    loop = loop_of(Solved(None), Stream(), Verifiers(), Generators("kept"), *keys)
    with pytest.raises(UserError, match=r"set data\.solution_column"):
        loop._dispatch(Solved(None).next())


def test_an_evaluation_without_prompts_asks_nobody() -> None:
    nobody: Any = None
    evaluator = Evaluator(
        prompts=[],
        generators=nobody,
        verifiers=nobody,
        log=nobody,
        config=config_with().eval,
        max_tokens=8,
    )
    assert asyncio.run(evaluator.run(0)) == {}
