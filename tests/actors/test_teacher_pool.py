"""Teachers in generators of their own: what they score, for whom, and how long one waits."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from learner_models import trajectories
from made_up_groups import receipt

from actors.generation.generator import Generator
from actors.rollout.teacher import TeacherPool
from common.config.sections import GeneratorConfig, ModelConfig
from common.errors import StallError
from common.supervision.calls import Handle
from common.supervision.waits import Waits


class Echo:
    """An engine that gives each scored token a hundredth of its id, negative."""

    def __init__(self) -> None:
        self.asked: list[tuple[list[int], int]] = []

    async def score(self, request_id: str, token_ids: list[int], prompt: int) -> list[float]:
        self.asked.append((token_ids, prompt))
        return [-token / 100 for token in token_ids[prompt:]]


def test_a_group_is_scored_token_for_token_behind_its_prompt() -> None:
    (batch,) = trajectories([(4, [3, 0, 2])])
    made = Generator("t", ModelConfig(path="x"), GeneratorConfig(), "object_store", 0, 0, None)
    engine = Echo()
    made._engine = engine  # type: ignore[assignment]
    scores, _ = asyncio.run(made.score_group(batch))
    rows = batch.to_pylist()
    said = [token for row in rows for token in row["token_ids"]]
    assert scores.dtype == np.float32
    assert scores.tolist() == pytest.approx([-token / 100 for token in said])
    prompt = rows[0]["prompt_ids"]
    assert engine.asked == [(prompt + row["token_ids"], 4) for row in rows if row["token_ids"]]


class Actor:
    """Answers in two parts, as Ray does for `num_returns=2`; hangs where it is told to."""

    def __init__(self, name: str, *, hangs: bool = False) -> None:
        self.name, self.hangs = name, hangs
        self.under_way = self.most = 0

    @property
    def score_group(self) -> Actor:
        return self

    def options(self, num_returns: int) -> Actor:
        assert num_returns == 2
        return self

    def remote(self, batch: Any) -> tuple[Any, Any]:
        return f"{self.name} on {batch}", asyncio.ensure_future(self._acknowledge())

    async def _acknowledge(self) -> None:
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        await (asyncio.Event().wait() if self.hangs else asyncio.sleep(0.01))
        self.under_way -= 1


def scored(actors: list[Actor], groups: int, deadline_s: float) -> list[Any]:
    async def main() -> list[Any]:
        handles: Any = {actor.name: Handle(actor) for actor in actors}
        receipts = [replace(receipt(0, 0, 0), group_id=n, batch_ref=n) for n in range(groups)]
        return await TeacherPool(handles, Waits()).score(receipts, deadline_s)

    return asyncio.run(main())


def test_scores_come_in_the_order_of_their_groups_from_whoever_has_least_to_do() -> None:
    actors = [Actor("teacher-0"), Actor("teacher-1")]
    found = scored(actors, 6, 5.0)
    assert [each.rpartition(" ")[2] for each in found] == list("012345")
    assert [actor.most for actor in actors] == [3, 3]


def test_a_teacher_that_hangs_ends_the_wait_by_its_name_and_its_key() -> None:
    with pytest.raises(StallError, match=r"teacher-0 \(teacher\.score_timeout_s\)"):
        scored([Actor("teacher-0", hangs=True)], 1, 0.1)
