"""Everything of vLLM that the project uses, behind one adapter, pinned to vLLM 0.32.

`Engine` owns one `AsyncLLM`, or on CPU an `EngineThread` that answers to the same names. Tokens go
in and tokens come out: nothing is detokenised, and a request is one completion, which comes as a
whole (`FINAL_ONLY`) with flat log-probabilities. With `processed_logprobs`, top_p = 1 and no top_k
they are those of the distribution sampled from, temperature included.

Legend: T tokens of a completion.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from actors.generation.engine_thread import EngineThread
from common.config.sections import GeneratorConfig, ModelConfig
from common.errors import RunError, UserError
from common.weights.transport import WeightTransport

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM

VLLM_VERSION = "0.32"
_BATCHED_TOKENS = 8192


@dataclass(frozen=True)
class Completion:
    """One sampled completion. `weight_versions` has one entry for each of the T tokens."""

    token_ids: list[int]
    logprobs: list[float]
    weight_versions: list[int]
    finish_reason: str
    guidance_length: int = 0
    """Leading tokens that were given, not sampled."""


class Engine:
    """One vLLM engine. Start it with `await Engine.start(...)`; end it with `shutdown`."""

    def __init__(self, llm: AsyncLLM | EngineThread) -> None:
        self._llm: Any = llm
        self._salt = 0  # counts updates: see `generate`

    @classmethod
    async def start(
        cls,
        model: ModelConfig,
        generator: GeneratorConfig,
        transport: WeightTransport,
        seed: int,
        version: int = 0,
    ) -> Engine:
        """Load the model and label its weights `version`.

        Raises:
            UserError: vLLM cannot start with these settings.
        """
        import vllm

        if not vllm.__version__.startswith(VLLM_VERSION):
            raise UserError(
                f"vLLM {vllm.__version__} is installed, {VLLM_VERSION} is needed: run `make setup`"
            )
        try:
            llm = await _start_llm(_engine_arguments(model, generator, transport, seed))
        except Exception as error:  # vLLM raises of every kind; whatever it is, it does not run
            raise UserError(
                f"vLLM did not start for {model.path}: {error} "
                "(if memory is short, lower generator.kv_cache_gib or model.max_length)"
            ) from error
        engine = cls(llm)
        await llm.update_weight_version(str(version))
        return engine

    async def generate(
        self, request_id: str, prompt_ids: list[int], sampling: dict[str, Any]
    ) -> Completion:
        """Sample one completion; `sampling` holds temperature, max_tokens and perhaps a seed.

        The completions of a group are requests of their own, so that each is there when it ends;
        they share their prompt through vLLM's prefix cache. Cancelling aborts the request.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        parameters = SamplingParams(
            logprobs=0,
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
            **sampling,
        )
        final = None
        # vLLM cannot clear its prefix cache while requests are under way, and some always are:
        # salted, a prefix is shared only with requests that came in under the same weights.
        prompt = {"prompt_token_ids": prompt_ids, "cache_salt": f"weights-{self._salt}"}
        async for output in self._llm.generate(prompt, parameters, request_id):
            final = output
        if final is None or len(final.outputs) != 1:
            raise RunError(f"vLLM returned no final output for {request_id}: please report it")
        return _completion(final.outputs[0])

    async def score(self, request_id: str, token_ids: list[int], prompt_length: int) -> list[float]:
        """Log-probabilities, at temperature 1, of `token_ids[prompt_length:]`."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        parameters = SamplingParams(
            max_tokens=1,
            temperature=0.0,
            prompt_logprobs=0,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        final = None
        async for output in self._llm.generate(
            {"prompt_token_ids": token_ids}, parameters, request_id
        ):
            final = output
        if final is None or final.prompt_logprobs is None:
            raise RunError(f"vLLM scored nothing for request {request_id}: please report it")
        positions = list(final.prompt_logprobs)[prompt_length:]
        scored = zip(token_ids[prompt_length:], positions, strict=True)
        return [position[token].logprob for token, position in scored]

    @property
    def in_process(self) -> bool:
        """Whether vLLM's worker runs in this process."""
        return isinstance(self._llm, EngineThread)

    async def init_weight_transfer(self, init_info: dict[str, Any]) -> None:
        """Give vLLM's own transport its start-up parameters."""
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        await self._llm.init_weight_transfer_engine(WeightTransferInitRequest(init_info=init_info))

    async def update(self, update_infos: list[dict[str, Any]], version: int) -> float:
        """Load a whole update. Requests under way are frozen, none is aborted.

        Returns:
            The seconds they stood still. With `AsyncLLM` its pause is included.
        """
        if self.in_process:
            self._salt += 1  # commands keep their order: see `begin_update`
            return await self._llm.update(update_infos, str(version))
        started = time.monotonic()
        await self.begin_update()
        for update_info in update_infos:
            await self.receive_weights(update_info)
        await self.end_update(version)
        return time.monotonic() - started

    async def begin_update(self) -> None:
        """Freeze the requests under way and open an update, with `AsyncLLM`.

        Until `end_update` has succeeded the engine serves nothing: a failed update leaves layers
        unloaded.
        """
        await self._llm.pause_generation(mode="keep", clear_cache=False)
        self._salt += 1  # a request that comes in from now on runs under the new weights
        await self._llm.start_weight_update()

    async def receive_weights(self, update_info: dict[str, Any]) -> None:
        """Load some of the weights, as the transport describes them."""
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        await self._llm.update_weights(WeightTransferUpdateRequest(update_info=update_info))

    async def end_update(self, version: int) -> None:
        """Close the update: tokens sampled from now on are stamped `version`."""
        await self._llm.finish_weight_update(str(version))
        await self._llm.resume_generation()

    async def sleep(self) -> None:
        """Give weights and cache back to the device.

        Requests under way would be aborted: there must be none. A whole update must follow
        `wake_weights`.
        """
        await self._llm.sleep(level=2)

    async def wake_weights(self) -> None:
        """Take memory for the weights again, for an update to fill."""
        await self._llm.wake_up(tags=["weights"])

    async def wake_cache(self) -> None:
        """Take memory for the cache again, and serve."""
        await self._llm.wake_up(tags=["kv_cache"])

    def shutdown(self) -> None:
        """End the engine's thread or processes."""
        self._llm.shutdown()


async def _start_llm(arguments: dict[str, Any]) -> AsyncLLM | EngineThread:
    """`AsyncLLM`, or on CPU with one rank the engine in a thread of this process."""
    from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs

    if arguments.get("distributed_executor_backend") == "uni":
        from vllm.v1.engine.llm_engine import LLMEngine

        return await EngineThread.start(lambda: LLMEngine.from_engine_args(EngineArgs(**arguments)))
    from vllm.v1.engine.async_llm import AsyncLLM

    return AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))


def _engine_arguments(
    model: ModelConfig, generator: GeneratorConfig, transport: WeightTransport, seed: int
) -> dict[str, Any]:
    import torch
    from vllm.config.weight_transfer import WeightTransferConfig

    arguments: dict[str, Any] = {
        "model": model.path,
        "dtype": model.dtype,
        "max_model_len": model.max_length,
        "trust_remote_code": model.trust_remote_code,
        "seed": seed,
        "max_num_seqs": generator.max_concurrent_sequences,
        "tensor_parallel_size": generator.tensor_parallel,
        "pipeline_parallel_size": generator.pipeline_parallel,
        "enforce_eager": generator.enforce_eager,
        "enable_prefix_caching": True,
        # The CPU default of 128 exceeds most prompts, and only whole blocks are shared within a
        # group; 32 is the least its attention kernel takes.
        "block_size": 32,
        "logprobs_mode": "processed_logprobs",
        "disable_log_stats": True,
        "weight_transfer_config": WeightTransferConfig(backend=transport.name),
        "worker_extension_cls": "actors.generation.weight_engine.WeightUpdateExtension",
        # Sampling defaults of the model's own generation_config.json would silently change
        # the distribution that the learner scores.
        "generation_config": "vllm",
    }
    if torch.cuda.is_available():
        arguments["gpu_memory_utilization"] = generator.memory_fraction
        arguments["enable_sleep_mode"] = transport.shares_devices
    else:
        arguments["kv_cache_memory_bytes"] = int(generator.kv_cache_gib * 2**30)
        if generator.max_staleness == 0:
            # A seed a request and a prompt in pieces do not go together on CPU: vLLM rewinds the
            # generator of a piece that samples nothing, which CPU generators cannot do.
            arguments["enable_chunked_prefill"] = False
            arguments["max_num_batched_tokens"] = max(model.max_length, _BATCHED_TOKENS)
        arguments.update(_single_process_on_cpu(generator))
    return arguments


def _single_process_on_cpu(generator: GeneratorConfig) -> dict[str, Any]:
    """Run engine and worker inside this process on CPU.

    vLLM's CPU platform replaces the single-process executor by one process a worker, because it
    binds OpenMP threads there. We bind them for the whole actor (see `deploy.placement.options`),
    so the extra processes and their queues would only take a core away.
    """
    if generator.devices > 1:
        return {}
    from actors.generation.cpu_kernels import IR_OP_PRIORITY

    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    return {
        "distributed_executor_backend": "uni",
        # A step's tokens are out before the next begins: none is stamped with a later version.
        "async_scheduling": False,
        "ir_op_priority": IR_OP_PRIORITY,
    }


def _completion(output: Any) -> Completion:
    versions: list[int] = []
    for span in output.weight_versions:
        versions.extend([int(span.version)] * (span.end - span.start))
    token_ids = list(output.token_ids)
    logprobs = list(output.logprobs.logprobs)
    if not len(token_ids) == len(logprobs) == len(versions):
        raise RunError(
            f"vLLM gave {len(token_ids)} tokens, {len(logprobs)} log-probabilities and "
            f"{len(versions)} versions for one completion: please report it"
        )
    return Completion(token_ids, logprobs, versions, output.finish_reason or "stop")
