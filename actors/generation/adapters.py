"""Adapters beside the weights of a vLLM engine: what it starts with, and how new ones come in.

The learner sends A and B of every layer. One adapter is in the engine at a time, under one number.
The next takes its place in memory, between two steps, and no request notices but by its tokens.
Nothing is read from disk: vLLM asks for a path, and is given one that does not exist. Should it
ever look there, it fails.

vLLM removes all adapters at the end of an update of weights. So these come by a call of their own
(`actors.generation.weight_engine.WeightUpdateExtension`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from common.config.data import ALL_LINEAR, AdapterConfig
from common.config.sections import ModelConfig
from common.errors import UserError
from common.weights.buckets import WeightBucket, unpack_tensors
from common.weights.lending import buffer_at

_NUMBER = 1
_NAME = "policy"
_NOWHERE = "/adapters/come/from/the/learner"
"""An absolute path: vLLM would look for any other on the hub."""


def adapter_arguments(model: ModelConfig, adapter: AdapterConfig) -> dict[str, Any]:
    """Arguments of vLLM's `EngineArgs` for one adapter.

    Layers without an adapter are left as they are. vLLM would have room for one on the embedding
    and on the head too, and compute products with zeros there.
    """
    return {
        "enable_lora": True,
        "max_loras": 1,
        "max_lora_rank": adapter.served_rank,
        "lora_target_modules": _targets(model, adapter),
    }


def adapter_request() -> Any:
    """What has a request computed with the adapter that the engine holds then."""
    from vllm.lora.request import LoRARequest

    return LoRARequest(_NAME, _NUMBER, _NOWHERE)


def _targets(model: ModelConfig, adapter: AdapterConfig) -> list[str]:
    """The last parts of the names of all layers that may have an adapter."""
    if adapter.targets != ALL_LINEAR:
        return sorted({each.strip().rpartition(".")[2] for each in adapter.targets.split(",")})
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    trusted = model.trust_remote_code
    config = AutoConfig.from_pretrained(model.path, trust_remote_code=trusted)
    with torch.device("meta"):
        blank = AutoModelForCausalLM.from_config(config, trust_remote_code=trusted)
    head = blank.get_output_embeddings()
    named = blank.named_modules()
    linear = (name for name, m in named if isinstance(m, nn.Linear | Conv1D) and m is not head)
    return sorted({name.rpartition(".")[2] for name in linear})


def replace_adapter(
    model: Any, update_infos: Sequence[dict[str, Any]], rank: int, alpha: int
) -> None:
    """Put the adapter of all buckets into the place of the one that `model` computes with.

    Args:
        model: of a vLLM worker that was started with `adapter_arguments`.
        update_infos: fields of buckets, each with a place for its buffer. Their checksums were
            looked at before.

    Raises:
        UserError: vLLM computes a layer otherwise than the learner, so that its adapter has no
            place. The one before is still there.
    """
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.peft_helper import PEFTHelper

    manager: Any = model.lora_manager
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    try:
        made = LoRAModel.from_lora_tensors(
            _NUMBER,
            _tensors(update_infos),
            PEFTHelper(r=rank, lora_alpha=alpha, target_modules=[]),
            device="cpu",
            dtype=manager.lora_config.lora_dtype,
            weights_mapper=None if mapper is None else mapper.get_rename_mapper(),
        )
    except (RuntimeError, ValueError) as error:
        raise _refused(model, str(error)) from error
    _check_places(model, made.loras)
    manager.remove_adapter(_NUMBER)
    manager.add_adapter(made)
    manager.activate_adapter(_NUMBER)


def _tensors(update_infos: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """Copies of the tensors of all buckets: vLLM multiplies them in place by alpha / rank."""
    buckets = [WeightBucket[str](**info) for info in update_infos]
    return {
        name: tensor.clone()
        for bucket in buckets
        for name, tensor in unpack_tensors(bucket, buffer_at(bucket.buffer))
    }


def _check_places(model: Any, loras: dict[str, Any]) -> None:
    """Raise `UserError` unless every layer's adapter is whole and has a layer: vLLM leaves out what
    it does not know, and says nothing."""
    manager: Any = model.lora_manager
    parts = {part for layer in manager.packed_modules.values() for part in layer}
    unknown = sorted(loras.keys() - (manager.modules.keys() | parts))
    if unknown:
        raise _refused(model, f"no layer of vLLM's that takes adapters is {_some(unknown)}")
    torn = sorted(
        name for name, pair in loras.items() if pair.lora_a is None or pair.lora_b is None
    )
    if torn or not loras:
        raise _refused(model, f"one matrix of a pair is missing: {_some(torn) or 'all of them'}")


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _refused(model: Any, why: str) -> UserError:
    return UserError(
        f"vLLM does not take these adapters beside {type(model).__name__}: {why}. "
        "weights.publish=merged sends all weights instead"
    )
