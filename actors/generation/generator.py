"""A generator: one vLLM engine in one Ray actor; groups in, Arrow record batches out.

Weight updates arrive while it generates. Requests are frozen for the length of an update and go on
with the new weights. Every token says which version sampled it.
"""

from __future__ import annotations

import asyncio
import math
import os
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from actors.generation.engine import Completion, Engine
from common.config.sections import GeneratorConfig, ModelConfig
from common.record.schema import rollout_schema
from common.supervision.faults import reached
from common.supervision.stacks import arm
from common.trajectory import GroupRequest
from common.weights.registry import TRANSPORTS

if TYPE_CHECKING:
    from common.weights.transport import StoredBucket

_GATHER_S = 2.0
"""Completions that end within this time of each other are verified together."""


class Generator:
    """Serves groups, canary scores and weight updates; all methods are coroutines."""

    def __init__(
        self,
        name: str,
        model: ModelConfig,
        config: GeneratorConfig,
        transport: str,
        seed: int,
        version: int,
        cores: list[int] | None,
        locate: Callable[[str], str] = str,
    ) -> None:
        """Keep the settings; `start` loads the model.

        Args:
            transport: name of the weight transport.
            version: number of the weights in the model's folder.
            cores: CPU cores of this process; None leaves it where it is.
            locate: gives the model's folder on this node for that of the driver.
        """
        self._name = name
        self._locate = locate
        self._model = model
        self._config = config
        self._transport = TRANSPORTS[transport]
        self._seed = seed
        self._version = version
        self._cores = cores
        self._engine: Engine | None = None
        self._tokenizer: Any = None
        self._scored = 0
        self._batches: dict[int, pa.RecordBatch] = {}  # by number, until they are taken
        self._num_batches = 0
        self._update_began = 0.0

    async def start(self) -> int:
        """Start the engine; returns this process's id."""
        from transformers import AutoTokenizer

        arm()
        if self._cores is not None:
            os.sched_setaffinity(0, self._cores)  # of this thread and those the engine starts
        folder = await asyncio.to_thread(self._locate, self._model.path)
        self._model = replace(self._model, path=folder)
        self._tokenizer = AutoTokenizer.from_pretrained(
            self._model.path, trust_remote_code=self._model.trust_remote_code
        )
        self._engine = await Engine.start(
            self._model, self._config, self._transport, self._seed, self._version
        )
        return os.getpid()

    @property
    def engine(self) -> Engine:
        """The engine, which `start` has started."""
        if self._engine is None:
            raise RuntimeError(f"{self._name} was used before start()")
        return self._engine

    async def generate_group(self, request: GroupRequest) -> AsyncIterator[int]:
        """Sample one group; yields the number of each batch of completions as they end.

        `take_batch` gives the batch of a number. Ray hands what is yielded over with its content,
        and the tokens are not for the coordinator.

        A batch holds completions that ended within two seconds of each other. So a straggler holds
        up the verification of no other, and a group of equal lengths is one batch. Completions not
        done after `request.cap_s` are aborted and are in no batch.
        """
        tasks = {
            asyncio.create_task(self._sample(request, index)): index
            for index in range(request.num_completions)
        }
        ends = math.inf if request.cap_s is None else time.monotonic() + request.cap_s
        pending = set(tasks)
        try:
            while pending and (left_s := ends - time.monotonic()) > 0:
                done, pending = await _finished(pending, left_s)
                sampled = {tasks[task]: task.result() for task in done}
                if sampled:
                    reached("completion sampled")
                    self._num_batches += 1
                    batch = self._batch(request, dict(sorted(sampled.items())))
                    self._batches[self._num_batches] = batch
                    yield self._num_batches
        finally:
            for task in pending:
                task.cancel()

    async def take_batch(self, number: int) -> pa.RecordBatch:
        """Give a finished batch away (`common.record.schema.rollout_schema`), once."""
        return self._batches.pop(number)

    async def _sample(self, request: GroupRequest, index: int) -> Completion:
        """Completion `index`; the last `num_guided` ones begin with the guidance."""
        guidance: list[int] = []
        if index >= request.num_completions - request.num_guided:
            guidance = list(request.guidance_ids)
        sampling: dict[str, Any] = {
            "temperature": request.temperature,
            "max_tokens": request.max_tokens - len(guidance),
        }
        if request.seed is not None and self._config.max_staleness == 0:
            sampling["seed"] = request.seed + index
        sampled = await self.engine.generate(
            f"group-{request.group_id}-{index}-{request.dispatched_s}",
            request.prompt_ids + guidance,
            sampling,
        )
        return with_guidance(sampled, guidance, request.dispatch_version) if guidance else sampled

    def _batch(self, request: GroupRequest, sampled: dict[int, Completion]) -> pa.RecordBatch:
        texts = self._tokenizer.batch_decode(
            [completion.token_ids for completion in sampled.values()], skip_special_tokens=True
        )
        return rollout_batch(request, sampled, texts, self._name)

    async def score(
        self, sequences: list[list[int]], prompt_lengths: list[int]
    ) -> list[list[float]]:
        """Score sequences behind their prompts under the weights held now.

        Returns:
            Log-probabilities at temperature 1, in nats, a list for each sequence.
        """
        self._scored += 1
        requests = [
            self.engine.score(f"score-{self._scored}-{index}", sequence, length)
            for index, (sequence, length) in enumerate(zip(sequences, prompt_lengths, strict=True))
        ]
        return list(await asyncio.gather(*requests))

    async def init_weight_transfer(self, init_info: dict[str, Any]) -> None:
        """Pass the transport's start-up parameters to the engine (nccl, ipc)."""
        await self.engine.init_weight_transfer(init_info)

    async def begin_update(self) -> None:
        """Freeze generation and open a weight update of vLLM's own transports (nccl, ipc)."""
        self._update_began = time.monotonic()
        await self.engine.begin_update()

    async def receive_weights(self, update_info: dict[str, Any]) -> None:
        """Take part of an update as vLLM's own transports describe it (nccl, ipc)."""
        await self.engine.receive_weights(update_info)

    async def end_update(self, version: int) -> float:
        """Close the update and go on; returns the seconds generation stood still."""
        await self.engine.end_update(version)
        return time.monotonic() - self._update_began

    async def sleep(self) -> None:
        """Leave the device to the learner (ipc)."""
        await self.engine.sleep()

    async def wake_weights(self) -> None:
        """Make room for the weights of an update (ipc)."""
        await self.engine.wake_weights()

    async def wake_cache(self) -> None:
        """Serve again (ipc)."""
        await self.engine.wake_cache()

    async def update_weights(self, buckets: list[StoredBucket], version: int) -> float:
        """Load a whole update; returns the seconds for which generation stood still.

        Raises:
            WeightsError: a bucket is not what the learner packed. Nothing has been loaded.
        """
        return await self._transport.receive(self.engine, buckets, version)

    async def ping(self) -> None:
        """A sign of life."""

    async def shutdown(self) -> None:
        """End the engine."""
        if self._engine is not None:
            await asyncio.to_thread(self._engine.shutdown)
            self._engine = None


def with_guidance(sampled: Completion, guidance_ids: list[int], version: int) -> Completion:
    """Put guidance, which the policy did not sample, before a sampled completion.

    Guidance tokens have no behaviour log-probability (NaN). They carry the version of the first
    sampled token, or `version` when none was sampled.
    """
    count = len(guidance_ids)
    return Completion(
        token_ids=guidance_ids + sampled.token_ids,
        logprobs=[math.nan] * count + sampled.logprobs,
        weight_versions=(sampled.weight_versions[:1] or [version]) * count
        + sampled.weight_versions,
        finish_reason=sampled.finish_reason,
        guidance_length=count,
    )


async def _finished(
    pending: set[asyncio.Task[Completion]], timeout_s: float
) -> tuple[set[asyncio.Task[Completion]], set[asyncio.Task[Completion]]]:
    """Wait for the next task to end and for what ends within `_GATHER_S` after it.

    Returns:
        The tasks that ended, and those still pending.
    """
    timeout = None if math.isinf(timeout_s) else timeout_s
    done, pending = await asyncio.wait(
        pending, timeout=timeout, return_when=asyncio.FIRST_COMPLETED
    )
    if done and pending:
        more, pending = await asyncio.wait(pending, timeout=min(_GATHER_S, timeout_s))
        done |= more
    return done, pending


def rollout_batch(
    request: GroupRequest, sampled: dict[int, Completion], texts: list[str], generator: str
) -> pa.RecordBatch:
    """Completions of a group, by their index in it, as one record batch."""
    completions = list(sampled.values())
    count = len(completions)
    columns: dict[str, list[Any]] = {
        "group_id": [request.group_id] * count,
        "ticket": [request.ticket] * count,
        "completion_index": list(sampled),
        "prompt_id": [request.prompt_id] * count,
        "epoch": [request.epoch] * count,
        "question": [request.question] * count,
        "prompt_text": [request.prompt_text] * count,
        "reference": [request.reference] * count,
        "prompt_ids": [request.prompt_ids] * count,
        "text": texts,
        "token_ids": [completion.token_ids for completion in completions],
        "behaviour_logprobs": [completion.logprobs for completion in completions],
        "weight_versions": [completion.weight_versions for completion in completions],
        "loss_mask": [_loss_mask(completion, request.mask_guidance) for completion in completions],
        "guidance_length": [completion.guidance_length for completion in completions],
        "finish_reason": [completion.finish_reason for completion in completions],
        "generator": [generator] * count,
        "dispatch_version": [request.dispatch_version] * count,
        "dispatched_s": [request.dispatched_s] * count,
        "finished_s": [time.time()] * count,
    }
    schema = rollout_schema()
    arrays = [pa.array(columns[field.name], type=field.type) for field in schema]
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def _loss_mask(completion: Completion, mask_guidance: bool) -> list[bool]:
    guided = completion.guidance_length
    return [not mask_guidance] * guided + [True] * (len(completion.token_ids) - guided)
