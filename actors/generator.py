"""A generator: one vLLM engine in one Ray actor; groups in, Arrow record batches out.

Weight updates arrive while it generates: requests are frozen for the length of the update and go
on with the new weights, and every token says which version sampled it.
"""

from __future__ import annotations

import asyncio
import math
import os
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray

from actors.engine import Completion, Engine
from common.config import GeneratorConfig, ModelConfig
from common.schema import rollout_schema
from common.trajectory import GroupRequest
from common.weights import WeightBucket

_SHARED_MEMORY = Path("/dev/shm")


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
    ) -> None:
        if cores is not None:
            os.sched_setaffinity(0, cores)  # inherited by the engine's processes
        self._name = name
        self._model = model
        self._config = config
        self._transport = transport
        self._seed = seed
        self._version = version
        self._engine: Engine | None = None
        self._tokenizer: Any = None
        self._scored = 0
        self._update_began = 0.0

    async def start(self) -> int:
        """Start the engine; returns this process's id."""
        from transformers import AutoTokenizer

        self._tokenizer = AutoTokenizer.from_pretrained(
            self._model.path, trust_remote_code=self._model.trust_remote_code
        )
        self._engine = await Engine.start(
            self._model, self._config, self._transport, self._seed, self._version
        )
        return os.getpid()

    @property
    def engine(self) -> Engine:
        if self._engine is None:
            raise RuntimeError(f"{self._name} was used before start()")
        return self._engine

    async def generate_group(self, request: GroupRequest) -> tuple[pa.RecordBatch, int]:
        """Sample one group: its batch (`common.schema.rollout_schema`) and its token count."""
        completions = await self._sample(request)
        texts = self._tokenizer.batch_decode(
            [completion.token_ids for completion in completions], skip_special_tokens=True
        )
        num_tokens = sum(len(completion.token_ids) for completion in completions)
        return rollout_batch(request, completions, texts, self._name), num_tokens

    async def _sample(self, request: GroupRequest) -> list[Completion]:
        """Plain completions first, then guided ones, whose tokens begin with the guidance."""
        name = f"group-{request.group_id}-{request.dispatched_s}"
        guidance = list(request.guidance_ids)
        num_plain = request.num_completions - request.num_guided
        samples = []
        if num_plain:
            sampling = {"temperature": request.temperature, "max_tokens": request.max_tokens}
            samples.append(self.engine.generate(name, request.prompt_ids, num_plain, sampling))
        if request.num_guided:
            prompt_ids = request.prompt_ids + guidance
            sampling = {
                "temperature": request.temperature,
                "max_tokens": request.max_tokens - len(guidance),
            }
            samples.append(
                self.engine.generate(f"{name}-guided", prompt_ids, request.num_guided, sampling)
            )
        parts = await asyncio.gather(*samples)
        version = request.dispatch_version
        guided = [with_guidance(sample, guidance, version) for sample in parts[-1]]
        plain = parts[0] if num_plain else []
        return [*plain, *guided] if request.num_guided else plain

    async def score(
        self, sequences: list[list[int]], prompt_lengths: list[int]
    ) -> list[list[float]]:
        """Log-probabilities of the continuations, temperature 1, under the weights held now."""
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
        """Freeze generation and open a weight update."""
        self._update_began = time.monotonic()
        await self.engine.begin_update()

    async def receive_weights(self, update_info: dict[str, Any]) -> None:
        """Take part of an update as vLLM's own transports describe it (nccl, ipc)."""
        await self.engine.receive_weights(update_info)

    async def end_update(self, version: int) -> float:
        """Close the update and go on; returns the seconds generation stood still."""
        await self.engine.end_update(version)
        return time.monotonic() - self._update_began

    async def update_weights(self, buckets: list[WeightBucket], version: int) -> float:
        """A whole update from the object store; returns the seconds generation stood still."""
        buffers = await asyncio.gather(*[bucket.ref for bucket in buckets])
        paths: list[Path] = []
        try:
            for index, buffer in enumerate(buffers):
                path = _SHARED_MEMORY / f"grpo-lambda-{os.getpid()}-{version}-{index}"
                paths.append(path)
                await asyncio.to_thread(path.write_bytes, buffer)
            await self.begin_update()
            for bucket, path in zip(buckets, paths, strict=True):
                await self.engine.receive_weights(_update_info(bucket, path))
            return await self.end_update(version)
        finally:
            for path in paths:
                path.unlink(missing_ok=True)

    async def shutdown(self) -> None:
        """End the engine's processes."""
        if self._engine is not None:
            await asyncio.to_thread(self._engine.shutdown)
            self._engine = None


def with_guidance(sampled: Completion, guidance_ids: list[int], version: int) -> Completion:
    """A completion that begins with tokens the policy did not sample.

    They have no behaviour log-probability (NaN) and carry the version of the first sampled token,
    or `version` when none was sampled.
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


def _update_info(bucket: WeightBucket, path: Path) -> dict[str, Any]:
    return {
        "path": str(path),
        "names": list(bucket.names),
        "dtypes": list(bucket.dtypes),
        "shapes": [list(shape) for shape in bucket.shapes],
        "offsets": list(bucket.offsets),
        "nbytes": bucket.nbytes,
        "checksum": bucket.checksum,
    }


def rollout_batch(
    request: GroupRequest, completions: list[Completion], texts: list[str], generator: str
) -> pa.RecordBatch:
    """The G completions of a group as one record batch."""
    count = len(completions)
    columns: dict[str, list[Any]] = {
        "group_id": [request.group_id] * count,
        "completion_index": list(range(count)),
        "prompt_id": [request.prompt_id] * count,
        "epoch": [request.epoch] * count,
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


GeneratorActor = ray.remote(Generator)
