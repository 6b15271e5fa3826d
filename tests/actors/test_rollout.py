"""A group is trained on, filtered or abandoned, and a dropped one frees its slot."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest
from made_up_groups import receipt
from scripted_rollout import (
    PARTS,
    Append,
    Generators,
    Rollout,
    Source,
    Verifiers,
    Writer,
    rollout_of,
)

from actors.data.prompts import Prompt
from actors.rollout.episodes import Episodes, GroupSampling
from actors.rollout.evaluate import Evaluator
from actors.rollout.pools import GroupLostError
from common.errors import StallError, UserError, VerifierError
from common.trajectory import GroupReceipt, GroupRequest


async def after_the_first_group(kind: str, announced: list[GroupReceipt]) -> tuple[Rollout, Writer]:
    writer = Writer()
    generators = Generators(kind)
    rollout = rollout_of(Source(), writer, Verifiers(), generators, announce=announced.append)
    running = asyncio.create_task(rollout.loop.run())
    for _ in range(50):
        await asyncio.sleep(0)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    return rollout, writer


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
    rollout, writer = asyncio.run(after_the_first_group(kind, announced))
    assert rollout.counts() == counts
    assert rollout.book.status() == status
    assert [group.group_id for group in announced] == ([0] if kind == "kept" else [])
    # Everything that was sampled is in the log, of dropped groups too.
    parts = [f"{kind} {part}" for part in range(PARTS[kind])]
    assert writer.append.logged == ([parts] if parts else [])


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

    writer = Writer()
    writer.append = WithoutRewards()
    rollout = rollout_of(Source(), writer, Broken(), Unjudged(""))
    with pytest.raises(ExceptionGroup) as raised:
        asyncio.run(asyncio.wait_for(rollout.loop.run(), 10))
    assert raised.group_contains(VerifierError, match="32 times: my_rule returned nan")
    assert rollout.counts() == (16, 15, 0)


class Solved(Source):
    """Prompts with a worked solution, or with none."""

    def __init__(self, solution: str | None) -> None:
        self.solution = solution

    def next(self) -> Prompt:
        return Prompt(0, "p", 0, 0, "?", "?", [1], "{}", self.solution, None)


@pytest.mark.parametrize(
    ("solution", "guidance", "guided"),
    [("abcdefghij", (97, 98, 99, 100, 101), 1), ("abc", (97, 98, 99), 1), ("", (), 0)],
)
def test_guidance_is_what_there_is_of_the_solution(
    solution: str, guidance: tuple[int, ...], guided: int
) -> None:
    keys = ("algorithm.rollout.guidance.ratio=0.5", "algorithm.rollout.guidance.max_tokens=5")
    rollout = rollout_of(Solved(solution), Writer(), Verifiers(), Generators("kept"), *keys)
    request = rollout.loop._request(Solved(solution).next())
    assert (request.guidance_ids, request.num_guided) == (guidance, guided)


def test_a_prompt_without_a_solution_cannot_be_guided() -> None:
    keys = ("algorithm.rollout.guidance.ratio=0.5",)
    rollout = rollout_of(Solved(None), Writer(), Verifiers(), Generators("kept"), *keys)
    with pytest.raises(UserError, match=r"set data\.solution_column"):
        rollout.loop._request(Solved(None).next())


def test_an_evaluation_without_prompts_asks_nobody() -> None:
    nobody: Any = None
    evaluator = Evaluator(prompts=[], episodes=nobody, log=nobody, max_tokens=8, log_timeout_s=1.0)
    assert asyncio.run(evaluator.run(0)) == {}


class Mortal(Generators):
    """The first request is lost with its generator; `late` says when."""

    def __init__(self, late: bool) -> None:
        super().__init__("kept")
        self.late = late
        self.asked: list[GroupRequest] = []

    async def generate(self, request: GroupRequest, deadline_s: float) -> AsyncIterator[str]:
        self.asked.append(request)
        if len(self.asked) == 1 and not self.late:
            raise GroupLostError("it died before the first batch")
        yield f"batch {len(self.asked)} a"
        if len(self.asked) == 1:
            raise GroupLostError("it died between two batches")
        yield f"batch {len(self.asked)} b"


class Forgetful(Verifiers):
    """Finds the first batch lost with its generator."""

    async def score(self, group_id: int, rollout_ref: str, deadline_s: float) -> str:
        if rollout_ref.startswith("batch 1"):
            raise GroupLostError("the batch died with its generator")
        return f"judged {rollout_ref}"


def asked(episodes: Episodes) -> GroupRequest:
    sampling = GroupSampling(num_completions=2, max_tokens=8, temperature=1.0)
    return episodes.request(Source().next(), sampling, group_id=3, seed=7)


@pytest.mark.parametrize("late", [False, True])
def test_a_group_that_dies_on_its_way_is_run_again_from_the_start(late: bool) -> None:
    generators: Any = Mortal(late)
    verifiers: Any = Forgetful()
    episodes = Episodes(generators, verifiers, sample_timeout_s=9.0, judge_timeout_s=9.0)
    request = asked(episodes)
    found = asyncio.run(episodes.run(request))
    assert found == ["judged batch 2 a", "judged batch 2 b"]
    assert generators.asked == [request, request]  # its seed and version too


def test_another_error_beside_a_lost_group_is_raised() -> None:
    class Broken(Forgetful):
        async def score(self, group_id: int, rollout_ref: str, deadline_s: float) -> str:
            if rollout_ref.endswith("b"):
                raise StallError("no verdict")
            return await super().score(group_id, rollout_ref, deadline_s)

    generators: Any = Unjudged("")
    verifiers: Any = Broken()

    async def parts(request: GroupRequest, deadline_s: float) -> AsyncIterator[str]:
        yield "batch 1 a"
        yield "batch 1 b"

    generators.generate = parts
    episodes = Episodes(generators, verifiers, sample_timeout_s=9.0, judge_timeout_s=9.0)
    with pytest.raises(ExceptionGroup) as raised:
        asyncio.run(asyncio.wait_for(episodes.run(asked(episodes)), 10))
    assert raised.group_contains(StallError, match="no verdict")
