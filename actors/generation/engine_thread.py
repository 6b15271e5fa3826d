"""vLLM's synchronous engine in a thread of this process, behind `AsyncLLM`'s names.

`AsyncLLM` runs its engine in a process of its own. There every token is encoded, sent and decoded,
on a CPU by the very cores that should compute it. Here nothing is between the caller and the engine
but a queue, which the engine's thread empties between two steps. A weight update is a command in
that queue, so no token is ever sampled in the middle of one. An engine that crashes takes its actor
with it. An engine that raises fails what it was asked, with its cause, and serves no more.

It has one model rank only: tensor parallelism and CUDA keep `AsyncLLM`.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from common.errors import RunError, UserError, WeightsError

if TYPE_CHECKING:
    from vllm.v1.engine.llm_engine import LLMEngine

_IDLE_S = 1.0
"""How often an idle engine looks whether it should end."""

Command = tuple[Callable[[], Any], "Future[Any]"]


class EngineThread:
    """Start with `await EngineThread.start(make)`; end with `shutdown`."""

    def __init__(self) -> None:
        self._commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._answers: dict[str, Future[Any]] = {}  # of the requests under way
        self._ended = False
        self._half_loaded = False  # between the beginning and the end of an update
        self._lock = threading.Lock()  # nothing is submitted behind the end
        self._error: Exception | None = None
        """Why nothing is served any more."""
        self._engine: Any = None  # vLLM's LLMEngine
        self._thread = threading.Thread(target=self._run, name="vllm-engine", daemon=True)

    @classmethod
    async def start(cls, make: Callable[[], LLMEngine]) -> EngineThread:
        """Make the engine in its thread.

        Raises:
            Exception: what `make` raised.
        """
        self = cls()

        def first() -> None:
            self._engine = make()

        begun = self._submit(first)
        self._thread.start()
        try:
            await asyncio.wrap_future(begun)
        except BaseException:
            self._ended = True
            raise
        return self

    async def generate(
        self, prompt: Any, parameters: Any, request_id: str, lora_request: Any = None
    ) -> AsyncIterator[Any]:
        """Yield one output, the final one. Cancelling aborts the request."""
        answer: Future[Any] = Future()
        asked = (request_id, prompt, parameters, lora_request)
        try:
            await self._call(lambda: self._add(*asked, answer))
            yield await asyncio.wrap_future(answer)
        finally:
            if not answer.done():
                self._submit(lambda: self._abort(request_id, answer))

    async def update(
        self,
        update_infos: list[dict[str, Any]],
        version: str,
        adapter: dict[str, int] | None = None,
    ) -> float:
        """Load a whole update between two steps; returns the seconds generation stood still.

        A failed update ends the engine, since layers are left half loaded. vLLM would take a second
        attempt for the rest of the first: it skips layers whose reload has begun.

        Args:
            adapter: `rank` and `alpha` of the adapter whose tensors these are; None where they are
                the model's weights.
        """
        seconds: float = await self._call(lambda: self._update(update_infos, version, adapter))
        return seconds

    @property
    def vllm_config(self) -> Any:
        """The settings with which the engine runs."""
        return self._engine.vllm_config

    async def update_weight_version(self, version: str) -> None:
        """Stamp tokens sampled from now on with `version`."""
        await self._call(lambda: self._engine.set_weight_version(version))

    def shutdown(self) -> None:
        """End the thread. Requests under way fail with `RunError`."""
        self._ended = True
        self._thread.join(timeout=10 * _IDLE_S)

    async def _call(self, work: Callable[[], Any]) -> Any:
        """Do `work` in the engine's thread, between two steps."""
        return await asyncio.wrap_future(self._submit(work))

    def _submit(self, work: Callable[[], Any]) -> Future[Any]:
        done: Future[Any] = Future()
        with self._lock:
            if self._error is not None:
                # Half loaded weights are a cause for a restart, whoever hears of them.
                kind = WeightsError if isinstance(self._error, WeightsError) else RunError
                raise kind(f"vLLM's engine is gone: {self._error}") from self._error
            self._commands.put((work, done))
        return done

    # The rest runs in the engine's thread.

    def _run(self) -> None:
        error: Exception = RunError("vLLM's engine was shut down")
        try:
            while not self._ended:
                self._obey()
                if self._answers:
                    self._step()
        except (RunError, UserError) as raised:
            error = raised
        except Exception as raised:  # whoever waits for this thread must hear of it
            error = RunError(f"vLLM's engine failed: {type(raised).__name__}: {raised}")
            error.__cause__ = raised
        except BaseException as raised:
            error = RunError(f"vLLM ended its engine: {raised!r}")
        with self._lock:
            self._error = error
        self._fail_all(error)
        if self._engine is not None:
            self._engine.engine_core.shutdown()

    def _obey(self) -> None:
        """Do what was submitted; with nothing to compute, wait for it."""
        idle = not self._answers
        try:
            while True:
                work, done = self._commands.get(block=idle, timeout=_IDLE_S)
                idle = False
                if not done.set_running_or_notify_cancel():
                    continue
                try:
                    done.set_result(work())
                except Exception as error:
                    done.set_exception(error)
                    if self._half_loaded:
                        raise
                except BaseException as error:
                    done.set_exception(RunError(f"vLLM ended its engine: {error!r}"))
                    raise
        except queue.Empty:
            return

    def _step(self) -> None:
        for output in self._engine.step():
            if output.finished and (answer := self._answers.pop(output.request_id, None)):
                answer.set_result(output)

    def _update(
        self, update_infos: list[dict[str, Any]], version: str, adapter: dict[str, int] | None
    ) -> float:
        started = time.monotonic()
        self._half_loaded = True
        if adapter is not None:
            asked = {"update_infos": update_infos, **adapter}
            self._engine.collective_rpc("replace_adapter", kwargs=asked)
        else:
            self._engine.collective_rpc("start_weight_update")
            for info in update_infos:
                self._engine.collective_rpc("update_weights", kwargs={"update_info": info})
            self._engine.collective_rpc("finish_weight_update")
        self._engine.set_weight_version(version)
        self._half_loaded = False
        return time.monotonic() - started

    def _add(
        self,
        request_id: str,
        prompt: Any,
        parameters: Any,
        lora_request: Any,
        answer: Future[Any],
    ) -> None:
        if request_id in self._answers:
            raise ValueError(f"request {request_id} is under way")
        self._engine.add_request(request_id, prompt, parameters, lora_request=lora_request)
        answer.set_running_or_notify_cancel()  # from here on this thread alone ends it
        self._answers[request_id] = answer

    def _abort(self, request_id: str, answer: Future[Any]) -> None:
        if self._answers.get(request_id) is answer:
            del self._answers[request_id]
            self._engine.abort_request([request_id])

    def _fail_all(self, error: Exception) -> None:
        for answer in self._answers.values():
            answer.set_exception(error)
        while not self._commands.empty():
            _, done = self._commands.get_nowait()
            if done.set_running_or_notify_cancel():
                done.set_exception(error)
