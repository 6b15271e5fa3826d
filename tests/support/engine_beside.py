"""A generator, with a real vLLM engine, in a process of its own beside a test.

vLLM changes classes of transformers in the process where it serves some architectures, and keeps
much that is global. So each engine has a process. They are forked from one that has imported vLLM,
and are there in seconds.
"""

from __future__ import annotations

import asyncio
import importlib
import multiprocessing as mp
import os
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from common.config.sections import AdapterConfig

_ANSWER_S = 300.0
_PRELOADED = ["vllm.v1.engine.llm_engine", "vllm.v1.worker.cpu_worker", "actors.generation.engine"]


class EngineBeside:
    """Calls into the process; an error there is raised here with its text."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe

    def score(self, sequences: list[list[int]], lengths: list[int]) -> list[list[float]]:
        """Log-probabilities of each sequence behind its prompt."""
        return self._ask("score", sequences, lengths)

    def update(self, buckets: list[Any], version: int) -> float:
        """Load what a learner has exported; the seconds for which generation stood still."""
        seconds: float = self._ask("update", buckets, version)
        return seconds

    def rate(self, prompts: list[list[int]], max_tokens: int) -> float:
        """Tokens a second of completions of just so many tokens, all prompts at once."""
        tokens: float = self._ask("rate", prompts, max_tokens)
        return tokens

    def sample(
        self, prompts: list[list[int]], temperature: float, max_tokens: int
    ) -> list[tuple[list[int], list[float]]]:
        """A completion of each prompt: its tokens and their log-probabilities."""
        return self._ask("sample", prompts, temperature, max_tokens)

    def sample_through(
        self, prompts: list[list[int]], max_tokens: int, buckets: list[Any], version: int
    ) -> list[tuple[list[int], list[int]]]:
        """A completion of each prompt, with an update after some steps: its tokens and the version
        that sampled each."""
        return self._ask("sample_through", prompts, max_tokens, buckets, version)

    def keep_salt(self, keep: bool) -> None:
        """Whether an update does not change the salt of what is cached."""
        self._ask("keep_salt", keep)

    def _ask(self, name: str, *arguments: Any) -> Any:
        self._pipe.send((name, arguments))
        return _answer(self._pipe)


class EngineError(Exception):
    """What an engine raised: its type and its text."""


def _answer(pipe: Connection) -> Any:
    if not pipe.poll(_ANSWER_S):
        raise TimeoutError(f"the engine gave no answer within {_ANSWER_S:.0f} s")
    value, error = pipe.recv()
    if error is not None:
        raise EngineError(error)
    return value


@contextmanager
def engine_beside(
    folder: Path,
    max_length: int,
    dtype: str = "float32",
    *,
    mended: bool = True,
    adapter: AdapterConfig | None = None,
    **generator: Any,
) -> Iterator[EngineBeside]:
    """An engine that has loaded `folder`.

    Args:
        adapter: what updates bring; None where they bring weights.
        generator: keys of `GeneratorConfig`, in the place of the usual ones here.
        mended: without it, experts are left as vLLM itself leaves them after an update.

    Raises:
        EngineError: it did not start.
    """
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    ours, theirs = context.Pipe()
    process = context.Process(
        target=_serve,
        args=(theirs, str(folder), max_length, dtype, mended, adapter, generator),
        daemon=True,
    )
    process.start()
    theirs.close()
    try:
        _answer(ours)
        yield EngineBeside(ours)
    finally:
        ours.close()
        process.join(timeout=20)
        if process.is_alive():
            process.kill()
            process.join()


def _serve(
    pipe: Connection,
    folder: str,
    max_length: int,
    dtype: str,
    mended: bool,
    adapter: AdapterConfig | None,
    keys: dict[str, Any],
) -> None:
    """The process: start, then answer until the other end is closed."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    if not mended:
        weight_engine = importlib.import_module("actors.generation.weight_engine")
        weight_engine.prepare_experts_again = lambda model: None
    asyncio.run(_answer_all(pipe, folder, max_length, dtype, adapter, keys))
    os._exit(0)  # vLLM's threads need not end


async def _answer_all(
    pipe: Connection,
    folder: str,
    max_length: int,
    dtype: str,
    adapter: AdapterConfig | None,
    keys: dict[str, Any],
) -> None:
    from actors.generation.generator import Generator
    from common.config.sections import GeneratorConfig, ModelConfig

    usual = {"max_staleness": 0, "kv_cache_gib": 0.05, "max_concurrent_sequences": 16}
    config = GeneratorConfig(**(usual | keys))
    model = ModelConfig(path=folder, dtype=dtype, max_length=max_length)
    generator = Generator("beside", model, config, "object_store", 0, 0, None, adapter=adapter)
    try:
        await generator.start()
        pipe.send((None, None))
    except Exception:
        pipe.send((None, traceback.format_exc()))
        return
    while True:
        try:
            name, arguments = await asyncio.to_thread(pipe.recv)
        except EOFError:
            break
        try:
            pipe.send((await _CALLS[name](generator, *arguments), None))
        except Exception:
            pipe.send((None, traceback.format_exc()))
    await generator.shutdown()


async def _score(generator: Any, sequences: list[list[int]], lengths: list[int]) -> Any:
    return await generator.score(sequences, lengths)


async def _update(generator: Any, buckets: list[Any], version: int) -> float:
    async def there(buffer: np.ndarray) -> np.ndarray:
        return buffer

    buckets = [bucket.at(there(bucket.buffer)) for bucket in buckets]
    return await generator.update_weights(buckets, version)


async def _sample(
    generator: Any, prompts: list[list[int]], temperature: float, max_tokens: int
) -> list[tuple[list[int], list[float]]]:
    asked = [
        generator.engine.generate(
            f"sample-{index}",
            prompt,
            {"temperature": temperature, "max_tokens": max_tokens, "seed": index},
        )
        for index, prompt in enumerate(prompts)
    ]
    return [(c.token_ids, c.logprobs) for c in await asyncio.gather(*asked)]


async def _rate(generator: Any, prompts: list[list[int]], max_tokens: int) -> float:
    sampling = {"temperature": 1.0, "max_tokens": max_tokens, "ignore_eos": True}
    began = time.monotonic()
    asked = [
        generator.engine.generate(f"rate-{index}", prompt, sampling)
        for index, prompt in enumerate(prompts)
    ]
    tokens = sum(len(one.token_ids) for one in await asyncio.gather(*asked))
    return tokens / (time.monotonic() - began)


_STEPS = 8
"""Steps of the engine before an update comes between them."""


async def _sample_through(
    generator: Any, prompts: list[list[int]], max_tokens: int, buckets: list[Any], version: int
) -> list[tuple[list[int], list[int]]]:
    thread, loop, there = generator.engine._llm, asyncio.get_running_loop(), asyncio.Event()
    step, left = thread._step, [_STEPS]

    def counted() -> None:
        step()
        left[0] -= 1
        if left[0] == 0:
            loop.call_soon_threadsafe(there.set)

    thread._step = counted
    asked = [
        generator.engine.generate(
            f"through-{index}", prompt, {"temperature": 1.0, "max_tokens": max_tokens}
        )
        for index, prompt in enumerate(prompts)
    ]
    sampling = asyncio.gather(*asked)
    await there.wait()
    await _update(generator, buckets, version)
    found = await sampling
    thread._step = step
    return [(one.token_ids, one.weight_versions) for one in found]


async def _keep_salt(generator: Any, keep: bool) -> None:
    kind = type(generator.engine)
    if keep:
        kind._salt = property(lambda self: -1, lambda self, value: None)
    else:
        del kind._salt


_CALLS = {
    "score": _score,
    "update": _update,
    "rate": _rate,
    "sample": _sample,
    "sample_through": _sample_through,
    "keep_salt": _keep_salt,
}
