"""A group's batches between a generator and the coordinator, call after call, on real Ray."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pyarrow as pa
import pytest
import ray

from actors.generation.under_way import Batches, UnderWay
from actors.rollout.pools import GeneratorPool
from common.errors import StallError
from common.supervision.calls import Handle, start_actor
from common.supervision.waits import Waits
from common.trajectory import GroupRequest


class Scripted:
    """Makes `num_completions` batches; the prompt says what then goes wrong."""

    def __init__(self) -> None:
        self._under_way = UnderWay()

    async def generate_group(self, request: GroupRequest) -> tuple[pa.RecordBatch | None, int]:
        return await self.more_of(self._under_way.begin(self._batches(request)))

    async def more_of(self, number: int) -> tuple[pa.RecordBatch | None, int]:
        return await self._under_way.next_of(number)

    async def _batches(self, request: GroupRequest) -> Batches:
        for left in reversed(range(request.num_completions)):
            index = request.num_completions - 1 - left
            batch = pa.record_batch({"tokens": [[index] * 1000]})
            yield batch, left > 0 or request.prompt_text != ""
        if request.prompt_text == "raises":
            raise ValueError("no such prompt")
        if request.prompt_text == "hangs":
            await asyncio.sleep(60)


@pytest.fixture(scope="module")
def scripted(local_ray: None) -> Handle[Scripted]:
    return start_actor(Scripted, {"num_cpus": 0})


def request(text: str, completions: int) -> GroupRequest:
    return GroupRequest(0, 0, "p", 0, "?", text, [1], "{}", completions, 10, 1.0, 0, 0.0)


async def received(actor: Any, asked: GroupRequest, deadline_s: float = 30.0) -> list[Any]:
    pool = GeneratorPool({"generator-0": actor}, Waits(), 0)
    return [ref async for ref in pool.generate(asked, deadline_s)]


def test_batches_are_there_however_late_they_are_read(scripted: Handle[Scripted]) -> None:
    async def many() -> list[list[Any]]:
        groups = [received(scripted, request(text, 20)) for text in ["", "nothing more"] * 10]
        begun = asyncio.gather(*groups)
        await asyncio.sleep(0)
        time.sleep(1.0)  # a busy coordinator: the actor is long done when it looks
        return await begun

    for refs in asyncio.run(many()):
        batches = ray.get(refs, timeout=30)
        assert [batch.column("tokens")[0].as_py()[0] for batch in batches] == list(range(20))


def test_what_the_generator_raises_comes_out_after_its_batches(scripted: Handle[Scripted]) -> None:
    with pytest.raises(ValueError, match="no such prompt"):
        asyncio.run(received(scripted, request("raises", 0)))
    with pytest.raises(ValueError, match="no such prompt"):
        asyncio.run(received(scripted, request("raises", 2)))


def test_a_generator_that_hangs_is_a_stall_with_its_name(scripted: Handle[Scripted]) -> None:
    with pytest.raises(StallError, match="completions from generator-0"):
        asyncio.run(received(scripted, request("hangs", 1), deadline_s=0.5))
