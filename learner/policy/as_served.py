"""The learner's model as vLLM serves it, where transformers decides otherwise.

Two decisions of vLLM cannot be asked away, so the learner follows them.

LongRoPE has factors for short and for long contexts. transformers chooses them by the largest
position of a call, and a call here is a row of many sequences: a short sequence would have other
log-probabilities beside a long one. vLLM chooses once, by the longest context that it serves.

The windows of Cohere's second and later models reach one token further back in vLLM, as those
models were trained.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

_WIDER_WINDOWS = ("cohere2", "cohere2_moe")
"""Values of `model_type`."""
_LONGEST_CHECK = 8192
"""Tokens up to which `reach` looks: plain attention holds the square of them for every head."""


def follow_engine(model: PreTrainedModel, max_length: int) -> None:
    """Change the model in place; `max_length` is the longest context of the run."""
    for module in model.modules():
        _fix_rotary(module, max_length)
    config: Any = model.config
    if config.model_type in _WIDER_WINDOWS and config.sliding_window:
        config.sliding_window += 1
        for module in model.modules():
            if isinstance(getattr(module, "sliding_window", None), int):
                module.sliding_window = config.sliding_window


@torch.no_grad()
def _fix_rotary(module: Any, max_length: int) -> None:
    """Choose LongRoPE's factors for good: a `default` embedding keeps those that it has."""
    kind = getattr(module, "rope_type", None)
    if not isinstance(kind, str | dict):
        return
    last = torch.tensor([[max_length - 1]])
    if kind == "longrope":
        module(torch.zeros(1), last)
        module.rope_type = "default"
    elif isinstance(kind, dict):
        for layer_type in [name for name, one in kind.items() if one == "longrope"]:
            module(torch.zeros(1), last, layer_type=layer_type)
            kind[layer_type] = "default"


def reach(config: Any, max_length: int) -> int:
    """The longest range within `max_length` behind which the model computes otherwise; 0 for none.

    Such ranges are windows, chunks of attention and the original length of rotary embeddings that
    change with the context. Those of more than 8,192 tokens are left out.
    """
    ranges = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    rotary = getattr(config, "rope_parameters", None) or {}
    for parameters in (rotary, *rotary.values()):
        if isinstance(parameters, dict) and parameters.get("rope_type") in ("longrope", "dynamic"):
            original = parameters.get("original_max_position_embeddings")
            ranges.append(original or config.max_position_embeddings)
    most = min(max_length - 1, _LONGEST_CHECK)
    return max((length for length in ranges if length and length <= most), default=0)
