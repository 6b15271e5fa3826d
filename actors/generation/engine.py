"""Everything of vLLM that the project uses, behind one adapter, for vLLM 0.32 and 0.33.

`Engine` owns one `AsyncLLM`, or on CPU an `EngineThread` that answers to the same names. Tokens go
in and tokens come out. A request is one completion, which comes as a whole (`FINAL_ONLY`) with flat
log-probabilities. With `processed_logprobs`, top_p = 1 and no top_k they are those of the
distribution sampled from, temperature included. Nothing is detokenised, unless a stop text has to
be looked for; the token that completes it is the last of the completion.

Legend: T tokens of a completion.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from actors.generation.adapters import adapter_request
from actors.generation.engine_arguments import changed_settings, engine_arguments
from actors.generation.engine_thread import EngineThread
from common.config.sections import AdapterConfig, GeneratorConfig, ModelConfig
from common.errors import RunError, UserError
from common.supervision.garbage import nothing_collected
from common.supervision.parents import ACTOR_PID
from common.weights.transport import WeightTransport

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM

VLLM_VERSIONS = ("0.32", "0.33")


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

    def __init__(self, llm: AsyncLLM | EngineThread, adapter: AdapterConfig | None = None) -> None:
        self._llm: Any = llm
        self._adapter = adapter
        self._lora: Any = None  # vLLM's name of the adapter, from the first update on
        self._salt = 0  # counts updates: see `generate`

    @classmethod
    async def start(
        cls,
        model: ModelConfig,
        generator: GeneratorConfig,
        transport: WeightTransport,
        seed: int,
        version: int = 0,
        cache_bytes: int | None = None,
        adapter: AdapterConfig | None = None,
    ) -> Engine:
        """Load the model and label its weights `version`.

        Args:
            cache_bytes: of the key-value cache on each CUDA device; None lets vLLM take what its
                share of the device leaves.
            adapter: what updates bring, beside the weights of the model's folder; None where they
                bring weights.

        Raises:
            UserError: vLLM cannot start with these settings.
        """
        _check_build()
        arguments = engine_arguments(model, generator, transport, seed, cache_bytes, adapter)
        try:
            llm = await _start_llm(arguments)
        except Exception as error:  # vLLM raises of every kind; whatever it is, it does not run
            raise UserError(
                f"vLLM did not start for {model.path}: {error}{_advice(str(error))}"
            ) from error
        if changed := changed_settings(arguments, llm.vllm_config):
            llm.shutdown()
            raise UserError(
                f"vLLM serves {model.path} with other settings than it was given: "
                f"{', '.join(changed)}. The learner computes with those given: set them to what "
                "vLLM takes, or train another model"
            )
        engine = cls(llm, adapter)
        await llm.update_weight_version(str(version))
        return engine

    async def generate(
        self, request_id: str, prompt_ids: list[int], sampling: dict[str, Any]
    ) -> Completion:
        """Sample one completion; `sampling` holds temperature, max_tokens, stop and perhaps a seed.

        The completions of a group are requests of their own, so that each is there when it ends;
        they share their prompt through vLLM's prefix cache. Cancelling aborts the request.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        if self._adapter is not None and self._lora is None:
            raise RunError(f"{request_id} came before the first adapter: please report it")
        asked = sampling | _stops(sampling.get("stop", ()))
        parameters = SamplingParams(
            logprobs=0, flat_logprobs=True, output_kind=RequestOutputKind.FINAL_ONLY, **asked
        )
        for name, value in asked.items():
            if getattr(parameters, name) != value:
                raise UserError(
                    f"vLLM samples with {name}={getattr(parameters, name)} where it is asked for "
                    f"{value}, and the learner scores with the latter: choose another value"
                )
        final = None
        # vLLM cannot clear its prefix cache while requests are under way, and some always are:
        # salted, a prefix is shared only with requests that came in under the same weights.
        prompt = {"prompt_token_ids": prompt_ids, "cache_salt": f"weights-{self._salt}"}
        asked_of = self._llm.generate(prompt, parameters, request_id, lora_request=self._lora)
        async for output in asked_of:
            final = output
        if final is None or len(final.outputs) != 1:
            raise RunError(f"vLLM returned no final output for {request_id}: please report it")
        return _completion(final.outputs[0])

    async def score(self, request_id: str, token_ids: list[int], prompt_length: int) -> list[float]:
        """Log-probabilities, at temperature 1, of `token_ids[prompt_length:]`.

        They are those of the model's folder until an adapter has come, where one is to come.
        """
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
            {"prompt_token_ids": token_ids}, parameters, request_id, lora_request=self._lora
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
        if self._adapter is not None:
            return await self._update_adapter(self._adapter, update_infos, version)
        if self.in_process:
            self._salt += 1  # commands keep their order: see `begin_update`
            return await self._llm.update(update_infos, str(version))
        started = time.monotonic()
        await self.begin_update()
        for update_info in update_infos:
            await self.receive_weights(update_info)
        await self.end_update(version)
        return time.monotonic() - started

    async def _update_adapter(
        self, adapter: AdapterConfig, update_infos: list[dict[str, Any]], version: int
    ) -> float:
        """`update`, where the tensors are those of an adapter."""
        started, settings = time.monotonic(), {"rank": adapter.rank, "alpha": adapter.alpha}
        if self.in_process:
            self._salt, self._lora = self._salt + 1, adapter_request()
            return await self._llm.update(update_infos, str(version), settings)
        await self._freeze()
        self._lora = adapter_request()
        asked = {"update_infos": update_infos, **settings}
        await self._llm.collective_rpc("replace_adapter", kwargs=asked)
        await self._llm.update_weight_version(str(version))
        await self._llm.resume_generation()
        return time.monotonic() - started

    async def begin_update(self) -> None:
        """Freeze the requests under way and open an update, with `AsyncLLM`.

        Until `end_update` has succeeded the engine serves nothing: a failed update leaves layers
        unloaded.
        """
        await self._freeze()
        await self._llm.start_weight_update()

    async def _freeze(self) -> None:
        """Freeze the requests under way, with `AsyncLLM`."""
        await self._llm.pause_generation(mode="keep", clear_cache=False)
        self._salt += 1  # a request that comes in from now on runs under the new weights

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


def import_vllm() -> None:
    """Import vLLM and what comes with it, torch and transformers: most of a generator's start."""
    with nothing_collected():
        import vllm.v1.engine.llm_engine  # noqa: F401


def device_bytes() -> int:
    """Memory of the CUDA device that this process was given.

    The driver is asked, not torch: that would take memory of the device for a context.
    """
    from vllm.platforms import current_platform

    return int(current_platform.get_device_total_memory())


def _check_build() -> None:
    """Raise `UserError` unless the installed vLLM can run here."""
    import torch
    import vllm
    from vllm.platforms import current_platform

    if not vllm.__version__.startswith(VLLM_VERSIONS):
        raise UserError(
            f"vLLM {vllm.__version__} is installed, {' or '.join(VLLM_VERSIONS)} is needed: run "
            "`make setup`"
        )
    if current_platform.is_cpu() or torch.cuda.is_available():
        return
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    why = "learner.device=cpu hides them" if hidden == "" else f"CUDA_VISIBLE_DEVICES={hidden}"
    raise UserError(
        f"vLLM {vllm.__version__} here is the build for CUDA, and torch sees no CUDA device"
        + (f" ({why})" if hidden is not None else "")
        + f": compare the driver that nvidia-smi shows with CUDA {torch.version.cuda}, or make an "
        "environment for the CPU (ENGINE=cpu make setup)"
    )


async def _start_llm(arguments: dict[str, Any]) -> AsyncLLM | EngineThread:
    """`AsyncLLM`, or on CPU with one rank the engine in a thread of this process."""
    from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs

    if arguments.get("distributed_executor_backend") == "uni":
        from vllm.v1.engine.llm_engine import LLMEngine

        return await EngineThread.start(lambda: LLMEngine.from_engine_args(EngineArgs(**arguments)))
    from vllm.v1.engine.async_llm import AsyncLLM

    os.environ[ACTOR_PID] = str(os.getpid())
    return AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))


def _advice(error: str) -> str:
    """What to do about an error of vLLM's start, where its text tells."""
    if "memory" in error.lower() or "KV cache" in error:
        return (
            " (lower model.max_length, or generator.kv_cache_gib on a CPU and "
            "generator.memory_fraction on CUDA, or free memory)"
        )
    if "lora" in error.lower():
        return " (weights.publish=merged sends whole weights, which it takes of any model)"
    if "attention configuration" in error:
        return " (vLLM has no attention for heads of this size here: train another model)"
    return ""


def _stops(stop: Sequence[str | int]) -> dict[str, Any]:
    """`generator.stop` as vLLM is told of it. Special tokens are text where texts end it."""
    texts = [one for one in stop if isinstance(one, str)]
    return {
        "stop": texts,
        "stop_token_ids": [one for one in stop if isinstance(one, int)],
        "detokenize": bool(texts),
        "skip_special_tokens": False,
        "spaces_between_special_tokens": False,
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
