"""Shapes of models that a plan need not download."""

from __future__ import annotations

import json
from pathlib import Path

from common.errors import UserError
from learner.policy.shape import ModelShape, shape_of_config


def _qwen2(vocabulary: int, *sizes: int, tied: bool) -> ModelShape:
    hidden, layers, heads, kv_heads, head_size, intermediate = sizes
    return ModelShape(
        vocabulary, hidden, layers, heads, kv_heads, head_size, intermediate, tied, True
    )


def _qwen3(*sizes: int, tied: bool) -> ModelShape:
    hidden, layers, heads, kv_heads, head_size, intermediate = sizes
    return ModelShape(
        151_936, hidden, layers, heads, kv_heads, head_size, intermediate, tied, head_norms=True
    )


MODELS = {
    "HuggingFaceTB/SmolLM2-135M": ModelShape(49_152, 576, 30, 9, 3, 64, 1536, True),
    "HuggingFaceTB/SmolLM2-360M": ModelShape(49_152, 960, 32, 15, 5, 64, 2560, True),
    "HuggingFaceTB/SmolLM2-1.7B": ModelShape(49_152, 2048, 24, 32, 32, 64, 8192, True),
    "HuggingFaceTB/SmolLM3-3B": ModelShape(128_256, 2048, 36, 16, 4, 128, 11_008, True),
    "Qwen/Qwen2.5-0.5B": _qwen2(151_936, 896, 24, 14, 2, 64, 4864, tied=True),
    "Qwen/Qwen2.5-1.5B": _qwen2(151_936, 1536, 28, 12, 2, 128, 8960, tied=True),
    "Qwen/Qwen2.5-3B": _qwen2(151_936, 2048, 36, 16, 2, 128, 11_008, tied=True),
    "Qwen/Qwen2.5-7B": _qwen2(152_064, 3584, 28, 28, 4, 128, 18_944, tied=False),
    "Qwen/Qwen2.5-14B": _qwen2(152_064, 5120, 48, 40, 8, 128, 13_824, tied=False),
    "Qwen/Qwen2.5-32B": _qwen2(152_064, 5120, 64, 40, 8, 128, 27_648, tied=False),
    "Qwen/Qwen3-0.6B": _qwen3(1024, 28, 16, 8, 128, 3072, tied=True),
    "Qwen/Qwen3-1.7B": _qwen3(2048, 28, 16, 8, 128, 6144, tied=True),
    "Qwen/Qwen3-4B": _qwen3(2560, 36, 32, 8, 128, 9728, tied=True),
    "Qwen/Qwen3-8B": _qwen3(4096, 36, 32, 8, 128, 12_288, tied=False),
    "Qwen/Qwen3-14B": _qwen3(5120, 40, 40, 8, 128, 17_408, tied=False),
    "Qwen/Qwen3-32B": _qwen3(5120, 64, 64, 8, 128, 25_600, tied=False),
    "meta-llama/Llama-3.2-1B": ModelShape(128_256, 2048, 16, 32, 8, 64, 8192, True),
    "meta-llama/Llama-3.2-3B": ModelShape(128_256, 3072, 28, 24, 8, 128, 8192, True),
    "meta-llama/Llama-3.1-8B": ModelShape(128_256, 4096, 32, 32, 8, 128, 14_336, False),
}
"""By name without `-Instruct` or `-Base`."""
_BUILTIN = {"builtin:smollm2-135m-instruct": "HuggingFaceTB/SmolLM2-135M"}
_TINY = ModelShape(320, 128, 4, 4, 4, 32, 352, True)


def model_shape(path: str) -> ModelShape:
    """The shape of a model, by a known name or from a Hugging Face folder.

    Raises: `UserError` for any other.
    """
    if path == "builtin:tiny-chain-sum":
        return _TINY
    name = _BUILTIN.get(path, path).removesuffix("-Instruct").removesuffix("-Base")
    known = MODELS.get(name)
    if known is not None:
        return known
    config = Path(path) / "config.json"
    if not config.is_file():
        raise UserError(
            f"the model {path}: its shape is not known here. Give a local folder, or one of "
            f"{', '.join(sorted(MODELS))}"
        )
    return shape_of_config(json.loads(config.read_text()))
