"""What vLLM's engine is started with, on CUDA and on a CPU, and whether it keeps to it."""

from __future__ import annotations

import os
from typing import Any

from actors.generation.adapters import adapter_arguments
from common.config.sections import AdapterConfig, GeneratorConfig, ModelConfig
from common.weights.transport import WeightTransport

_CPU_BLOCK = 32
"""Tokens of a block of the cache on a CPU. vLLM's default of 128 there exceeds most prompts, and
only whole blocks are shared within a group; 32 is the least that its attention kernel takes."""


def engine_arguments(
    model: ModelConfig,
    generator: GeneratorConfig,
    transport: WeightTransport,
    seed: int,
    cache_bytes: int | None,
    adapter: AdapterConfig | None = None,
) -> dict[str, Any]:
    """Arguments of vLLM's `EngineArgs`; `cache_bytes` and `adapter` as `Engine.start` has them."""
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
        "logprobs_mode": "processed_logprobs",
        "disable_log_stats": True,
        "weight_transfer_config": WeightTransferConfig(backend=transport.name),
        "worker_extension_cls": "actors.generation.weight_engine.WeightUpdateExtension",
        # Sampling defaults of the model's own generation_config.json would silently change
        # the distribution that the learner scores.
        "generation_config": "vllm",
    }
    if adapter is not None:
        arguments |= adapter_arguments(model, adapter)
    if generator.devices > 1:
        # In a placement group vLLM would have Ray start its workers, each in a bundle with a device
        # of its own; all devices of a generator are in one.
        arguments["distributed_executor_backend"] = "mp"
    cuda = torch.cuda.is_available()
    if generator.quantization is not None:
        from actors.generation.quantized import method_of

        arguments["quantization"] = method_of(generator.quantization, cuda=cuda)
    if cuda:
        return arguments | _on_cuda(generator, transport, cache_bytes)
    return arguments | _on_cpu(model, generator)


def _on_cuda(
    generator: GeneratorConfig, transport: WeightTransport, cache_bytes: int | None
) -> dict[str, Any]:
    cache = {} if cache_bytes is None else {"kv_cache_memory_bytes": cache_bytes}
    return cache | {
        "gpu_memory_utilization": generator.memory_fraction,
        "enable_sleep_mode": transport.shares_devices,
        "max_num_batched_tokens": max(generator.batched_tokens, generator.max_concurrent_sequences),
    }


def _on_cpu(model: ModelConfig, generator: GeneratorConfig) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "block_size": _CPU_BLOCK,
        "kv_cache_memory_bytes": int(generator.kv_cache_gib * 2**30),
    }
    if generator.max_batched_tokens is not None:
        arguments["max_num_batched_tokens"] = generator.max_batched_tokens
    if generator.max_staleness == 0:
        # A seed a request and a prompt in pieces do not go together on CPU: vLLM rewinds the
        # generator of a piece that samples nothing, which CPU generators cannot do.
        arguments["enable_chunked_prefill"] = False
        arguments["max_num_batched_tokens"] = max(model.max_length, generator.batched_tokens)
    return arguments | _single_process_on_cpu(generator)


def changed_settings(arguments: dict[str, Any], config: Any) -> list[str]:
    """What vLLM has made of settings on which numbers depend, where it is not what was asked."""
    model, scheduler, cache = config.model_config, config.scheduler_config, config.cache_config
    used = {
        "dtype": str(model.dtype).removeprefix("torch."),
        "max_model_len": model.max_model_len,
        "seed": model.seed,
        "logprobs_mode": model.logprobs_mode,
        "quantization": model.quantization,
        "kv_cache_dtype": cache.cache_dtype,
        "enable_chunked_prefill": scheduler.enable_chunked_prefill,
        "async_scheduling": scheduler.async_scheduling,
    }
    return [
        f"{name} is {value} instead of {_asked(arguments, name, value)}"
        for name, value in used.items()
        if value != _asked(arguments, name, value)
    ]


def _asked(arguments: dict[str, Any], name: str, used: Any) -> Any:
    """What was asked for: where nothing was said, vLLM may choose, but no other numbers."""
    return arguments.get(name, _UNSAID.get(name, used))


_UNSAID = {"quantization": None, "kv_cache_dtype": "auto"}


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
