"""The adapter over vLLM: what a request carries. No engine is started."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

from actors.generation.engine import Engine


class FakeLLM:
    """Answers every request with one token, and keeps what it was asked."""

    def __init__(self) -> None:
        self.prompts: list[dict[str, Any]] = []

    async def generate(self, prompt: dict[str, Any], *_: Any) -> AsyncIterator[Any]:
        self.prompts.append(prompt)
        span = SimpleNamespace(version="4", start=0, end=1)
        output = SimpleNamespace(
            weight_versions=[span],
            token_ids=[7],
            logprobs=SimpleNamespace(logprobs=[-0.5]),
            finish_reason="stop",
        )
        yield SimpleNamespace(outputs=[output])

    async def pause_generation(self, mode: str, clear_cache: bool) -> None:
        assert (mode, clear_cache) == ("keep", False)

    async def start_weight_update(self) -> None: ...


def test_cached_prefixes_are_shared_among_requests_of_the_same_weights_only() -> None:
    """vLLM cannot clear its cache while requests are under way, so salts keep versions apart."""
    llm = FakeLLM()
    engine = Engine(llm)  # type: ignore[arg-type]

    async def before_and_during_an_update() -> None:
        sampling = {"temperature": 1.0, "max_tokens": 1}
        await engine.generate("a", [1, 2], sampling)
        await engine.generate("b", [1, 2], sampling)
        await engine.begin_update()
        await engine.generate("c", [1, 2], sampling)

    asyncio.run(before_and_during_an_update())
    first, second, after = (prompt["cache_salt"] for prompt in llm.prompts)
    assert first == second != after
