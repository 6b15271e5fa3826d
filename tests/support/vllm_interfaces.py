"""What our code takes for given of vLLM 0.32 and of 0.33, where the two differ.

`of_033` is a stand-in, written for these tests: as strict as the real one, and no more. A wheel
that lies in VLLM_WHEEL is loaded for real too, as far as its `weight_transfer/base.py` goes, and
asked for the names in `USED`:

    pip download --no-deps vllm==0.33.0
    VLLM_WHEEL=vllm-0.33.0-*.whl python -m pytest tests/common/test_device_to_device.py
"""

from __future__ import annotations

import ast
import os
import types
import zipfile
from abc import ABC
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

BASE = "vllm.distributed.weight_transfer.base"


def of_033() -> Any:
    """A module like 0.33's `weight_transfer.base`."""

    @dataclass(frozen=True)
    class ParamMeta:
        name: str
        dtype: torch.dtype
        shape: tuple[int, ...]
        owners: tuple[int, ...] | None = None

    class WeightSource(ABC):
        metadata: list[ParamMeta]

        def __init_subclass__(cls, **kwargs: Any) -> None:
            super().__init_subclass__(**kwargs)
            if not isinstance(vars(cls).get("metadata", cached_property(len)), cached_property):
                raise TypeError(f"{cls.__name__}.metadata must be a functools.cached_property")

        def owned_names(self, rank: int) -> list[str]:
            return [m.name for m in self.metadata if m.owners is None or rank in m.owners]

        def implements_iter_full(self) -> bool:
            return type(self).iter_full is not WeightSource.iter_full

        def iter_full(self) -> Iterator[tuple[str, torch.Tensor]]:
            raise NotImplementedError

    found = types.ModuleType(BASE)
    vars(found).update(ParamMeta=ParamMeta, WeightSource=WeightSource)
    return found


def of_wheel() -> Any | None:
    """The module of the wheel in VLLM_WHEEL; None where none is named."""
    path = os.environ.get("VLLM_WHEEL")
    if not path:
        return None
    with zipfile.ZipFile(path) as wheel:
        source = wheel.read(BASE.replace(".", "/") + ".py")
    found = types.ModuleType(BASE)
    exec(compile(source, path, "exec"), vars(found))
    return found


def installed() -> Any:
    import vllm.distributed.weight_transfer.base as found

    return found


INTERFACES = {"installed": installed, "0.33": of_033} | (
    {"wheel": of_wheel} if os.environ.get("VLLM_WHEEL") else {}
)


def read(source: Any, rank: int) -> tuple[list[Any], list[tuple[str, torch.Tensor]]]:
    """Metadata and tensors of a source, as the trainer's engines of its version read it."""
    if not hasattr(source, "iter_full"):  # 0.32
        return source.metadata(), list(source)
    assert source.implements_iter_full()
    assert source.owned_names(rank) == [facts.name for facts in source.metadata]
    return source.metadata, list(source.iter_full())


USED = {
    "v1/engine/async_llm.py": {
        "AsyncLLM": {
            *("from_engine_args", "generate", "shutdown", "sleep", "wake_up"),
            *("pause_generation", "resume_generation", "init_weight_transfer_engine"),
            *("start_weight_update", "update_weights", "finish_weight_update"),
            *("update_weight_version", "collective_rpc"),
        },
    },
    "v1/engine/llm_engine.py": {
        "LLMEngine": {
            *("from_engine_args", "add_request", "abort_request", "step", "collective_rpc"),
            "set_weight_version",
        },
    },
    "engine/arg_utils.py": {
        "EngineArgs": {
            *("model", "dtype", "max_model_len", "trust_remote_code", "seed", "max_num_seqs"),
            *("tensor_parallel_size", "pipeline_parallel_size", "enforce_eager", "block_size"),
            *("enable_prefix_caching", "logprobs_mode", "disable_log_stats", "generation_config"),
            *("weight_transfer_config", "worker_extension_cls", "distributed_executor_backend"),
            *("gpu_memory_utilization", "enable_sleep_mode", "max_num_batched_tokens"),
            *("kv_cache_memory_bytes", "enable_chunked_prefill", "async_scheduling"),
            *("enable_lora", "max_loras", "max_lora_rank", "lora_target_modules"),
            "ir_op_priority",
        },
    },
    "lora/request.py": {"LoRARequest": {"lora_name", "lora_int_id", "lora_path"}},
    "lora/peft_helper.py": {"PEFTHelper": {"r", "lora_alpha", "target_modules"}},
    "lora/lora_model.py": {"LoRAModel": {"from_lora_tensors"}},
    "lora/model_manager.py": {
        "LoRAModelManager": {"add_adapter", "remove_adapter", "activate_adapter"},
    },
    "outputs.py": {"CompletionOutput": {"weight_versions", "token_ids", "logprobs"}},
    "sampling_params.py": {
        "SamplingParams": {"logprobs", "flat_logprobs", "detokenize", "output_kind", "seed"},
    },
    "distributed/weight_transfer/base.py": {
        "ParamMeta": {"name", "dtype", "shape"},
        "WeightTransferInitRequest": {"init_info"},
        "WeightTransferUpdateRequest": {"update_info"},
        "WeightTransferEngine": {
            *("init_info_cls", "update_info_cls", "init_transfer_engine", "start_weight_update"),
            *("update_weights", "finish_weight_update", "receive_weights", "shutdown"),
        },
    },
    "distributed/weight_transfer/nccl_engine.py": {
        "NCCLTrainerInitInfo": {"master_address", "master_port", "world_size"}
        | {"packed_num_buffers"},
    },
    "distributed/weight_transfer/ipc_engine.py": {
        "IPCTrainerInitInfo": {"packed", "packed_buffer_size_bytes"},
    },
    "distributed/weight_transfer/factory.py": {
        "WeightTransferEngineFactory": {"_registry", "register_engine"},
        "WeightTransferTrainerFactory": {"trainer_init"},
    },
    "model_executor/model_loader/reload/layerwise.py": {
        "": {"initialize_layerwise_reload", "finalize_layerwise_reload"},
    },
    "platforms/interface.py": {"Platform": {"is_cpu", "get_device_total_memory"}},
}
"""Names that our code uses, by file of vLLM and class; "" has those of the module itself."""


def lacking(source: Callable[[str], str]) -> dict[str, set[str]]:
    """What of `USED` the sources of a version do not define; `source` gives a file's text."""
    found = {}
    for path, classes in USED.items():
        tree = ast.parse(source(path))
        for name, used in classes.items():
            bodies = [tree.body] if not name else [
                node.body for node in tree.body
                if isinstance(node, ast.ClassDef) and node.name == name
            ]  # fmt: skip
            missing = used - {each for body in bodies for each in _defined(body)}
            if missing:
                found[f"{path}:{name}"] = missing
    return found


def _defined(body: list[ast.stmt]) -> Iterator[str]:
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.name
            if node.name == "__init__":
                yield from (argument.arg for argument in node.args.args)
                yield from (argument.arg for argument in node.args.kwonlyargs)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id
        elif isinstance(node, ast.Assign):
            yield from (target.id for target in node.targets if isinstance(target, ast.Name))


def source_installed(path: str) -> str:
    import vllm

    return (Path(vllm.__file__).parent / path).read_text()


def source_of_wheel(path: str) -> str:
    with zipfile.ZipFile(os.environ["VLLM_WHEEL"]) as wheel:
        return wheel.read(f"vllm/{path}").decode()


SOURCES = {"installed": source_installed} | (
    {"wheel": source_of_wheel} if os.environ.get("VLLM_WHEEL") else {}
)
