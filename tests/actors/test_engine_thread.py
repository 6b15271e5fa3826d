"""The engine's thread, on a scripted engine."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import pytest

from actors.generation.engine_thread import EngineThread
from common.errors import RunError


@dataclass
class Output:
    request_id: str
    finished: bool
    version: str


@dataclass
class ScriptedEngine:
    """A request ends after as many steps as its prompt says; everything that happens is written."""

    left: dict[str, int] = field(default_factory=dict)
    version: str = "0"
    events: list[str] = field(default_factory=list)
    threads: set[int] = field(default_factory=set)
    step_s: float = 0.002

    def add_request(self, request_id: str, prompt: int, parameters: Any, lora_request: Any) -> None:
        if prompt < 1:
            raise ValueError("empty prompt")
        self.left[request_id] = prompt

    def abort_request(self, request_ids: list[str]) -> None:
        self.events.append(f"abort {request_ids[0]}")
        del self.left[request_ids[0]]

    def step(self) -> list[Output]:
        self.threads.add(threading.get_ident())
        self.events.append("step")
        time.sleep(self.step_s)
        if "breaks" in self.left:
            raise FloatingPointError("a kernel failed")
        self.left = {name: steps - 1 for name, steps in self.left.items()}
        done = [name for name, steps in self.left.items() if steps == 0]
        self.left = {name: steps for name, steps in self.left.items() if steps}
        going = [Output(name, False, self.version) for name in self.left]
        return [*going, *(Output(name, True, self.version) for name in done)]

    def collective_rpc(self, method: str, kwargs: Any = None) -> list[None]:
        self.threads.add(threading.get_ident())
        self.events.append(method)
        if kwargs == {"update_info": {"bucket": "torn"}}:
            raise RuntimeError("checksum")
        return [None]

    @property
    def engine_core(self) -> ScriptedEngine:
        return self

    def shutdown(self) -> None:
        self.events.append("shutdown")

    def set_weight_version(self, version: str) -> None:
        self.version = version


async def answer(thread: EngineThread, name: str, steps: int) -> Output:
    (output,) = [each async for each in thread.generate(steps, None, name)]
    return output  # type: ignore[no-any-return]


T = TypeVar("T")


def on_thread(work: Callable[[EngineThread], Awaitable[T]], engine: Any = None) -> T:
    """The result of `work` with a thread of its own around `engine`."""

    async def main() -> T:
        thread = await EngineThread.start(lambda: engine or ScriptedEngine())
        try:
            return await work(thread)
        finally:
            thread.shutdown()

    return asyncio.run(main())


def test_requests_end_when_their_own_tokens_do_and_all_in_one_thread() -> None:
    engine = ScriptedEngine()

    async def work(thread: EngineThread) -> list[str]:
        order: list[str] = []

        async def ask(name: str, steps: int) -> None:
            assert (await answer(thread, name, steps)).request_id == name
            order.append(name)

        await asyncio.gather(ask("long", 30), ask("short", 2), ask("middle", 10))
        return order

    assert on_thread(work, engine) == ["short", "middle", "long"]
    assert len(engine.threads) == 1
    assert engine.threads != {threading.get_ident()}


def test_no_step_falls_into_an_update_and_requests_live_through_it() -> None:
    engine = ScriptedEngine()

    async def work(thread: EngineThread) -> Output:
        going = asyncio.create_task(answer(thread, "a", 40))
        await asyncio.sleep(0.02)
        assert await thread.update([{"bucket": index} for index in range(3)], "7") >= 0
        return await going

    assert on_thread(work, engine).version == "7"
    update = ["start_weight_update", *["update_weights"] * 3, "finish_weight_update"]
    first = engine.events.index("start_weight_update")
    assert engine.events[first : first + len(update)] == update
    assert engine.events.count("step") == 40
    assert 0 < first < 40


def test_an_adapter_comes_whole_between_two_steps() -> None:
    engine = ScriptedEngine()

    async def work(thread: EngineThread) -> Output:
        going = asyncio.create_task(answer(thread, "a", 40))
        await asyncio.sleep(0.02)
        buckets = [{"bucket": index} for index in range(3)]
        assert await thread.update(buckets, "7", {"rank": 4, "alpha": 8}) >= 0
        return await going

    assert on_thread(work, engine).version == "7"
    assert engine.events.count("step") == 40
    assert set(engine.events) == {"step", "replace_adapter", "shutdown"}
    assert engine.events.count("replace_adapter") == 1


def test_half_an_update_ends_the_engine() -> None:
    """vLLM would take a second attempt for the rest of the first, and load layers wrongly."""
    engine = ScriptedEngine()

    async def work(thread: EngineThread) -> None:
        going = asyncio.create_task(answer(thread, "a", 30))
        await asyncio.sleep(0.01)
        with pytest.raises(RuntimeError, match="checksum"):
            await thread.update([{"bucket": 0}, {"bucket": "torn"}], "7")
        steps = engine.events.count("step")
        with pytest.raises(RunError, match="engine failed: RuntimeError: .*checksum"):
            await going
        with pytest.raises(RunError, match="checksum"):
            await thread.update([{"bucket": 0}, {"bucket": 1}], "7")
        assert engine.events.count("step") == steps < 30

    on_thread(work, engine)
    assert engine.events[-1] == "shutdown"


def test_an_exit_in_the_engine_is_heard_by_all_and_a_request_is_answered_once() -> None:
    async def work(thread: EngineThread) -> None:
        first = asyncio.create_task(answer(thread, "a", 50))
        await asyncio.sleep(0)
        with pytest.raises(ValueError, match="a is under way"):
            await answer(thread, "a", 50)
        with pytest.raises(RunError, match=r"SystemExit\(3\)"):
            await thread._call(lambda: sys.exit(3))
        with pytest.raises(RunError, match=r"SystemExit\(3\)"):
            await first

    on_thread(work)


def test_a_refused_request_is_its_own_failure_only() -> None:
    async def work(thread: EngineThread) -> None:
        with pytest.raises(ValueError, match="empty prompt"):
            await answer(thread, "a", 0)
        assert (await answer(thread, "b", 1)).request_id == "b"

    on_thread(work)


def test_a_cancelled_request_is_aborted_and_the_others_go_on() -> None:
    engine = ScriptedEngine()

    async def work(thread: EngineThread) -> None:
        doomed = asyncio.create_task(answer(thread, "doomed", 10_000))
        other = asyncio.create_task(answer(thread, "other", 20))
        await asyncio.sleep(0.01)
        doomed.cancel()
        await other
        with pytest.raises(asyncio.CancelledError):
            await doomed

    on_thread(work, engine)
    assert "abort doomed" in engine.events
    assert engine.left == {}


def test_a_failed_step_fails_every_request_and_all_that_come_later() -> None:
    async def work(thread: EngineThread) -> None:
        results = await asyncio.gather(
            answer(thread, "a", 50), answer(thread, "breaks", 50), return_exceptions=True
        )
        assert [type(result) for result in results] == [RunError] * 2
        assert "engine failed: FloatingPointError: a kernel failed" in str(results[0])
        with pytest.raises(RunError, match="a kernel failed"):
            await answer(thread, "late", 1)

    on_thread(work)


def test_shutdown_ends_the_thread_and_whoever_waits() -> None:
    async def work(thread: EngineThread) -> None:
        going = asyncio.create_task(answer(thread, "a", 100_000))
        await asyncio.sleep(0.01)
        thread.shutdown()
        with pytest.raises(RunError, match="shut down"):
            await going
        with pytest.raises(RunError, match="shut down"):
            await thread.update_weight_version("8")
        assert not thread._thread.is_alive()

    on_thread(work)


def test_requests_still_in_the_queue_when_the_engine_ends_hear_of_it() -> None:
    async def work(thread: EngineThread) -> None:
        going = [asyncio.create_task(answer(thread, "a", 50))]
        await asyncio.sleep(0.01)
        blocking = asyncio.create_task(thread._call(lambda: time.sleep(0.1)))
        update = asyncio.create_task(thread.update([{"bucket": "torn"}], "1"))
        going += [asyncio.create_task(answer(thread, f"late-{i}", 5)) for i in range(3)]
        results = await asyncio.gather(*going, return_exceptions=True)
        assert ["checksum" in str(result) for result in results] == [True] * 4
        await blocking
        with pytest.raises(RuntimeError, match="checksum"):
            await update

    on_thread(work)


def test_an_engine_that_cannot_start_says_why_and_leaves_no_thread() -> None:
    def make() -> Any:
        raise ValueError("no such model")

    async def main() -> None:
        with pytest.raises(ValueError, match="no such model"):
            await EngineThread.start(make)

    asyncio.run(main())
    deadline = time.monotonic() + 5
    while any(thread.name == "vllm-engine" for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
