"""The shape of a decoder, as far as its size, its work and its memory follow from it.

ModelShape          numbers of a dense decoder with grouped-query attention and a gated MLP
shape_of_config     reads them from what config.json holds
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from common.config.data import ALL_LINEAR
from common.errors import UserError, nearest

BYTES = 2
"""Bytes of a weight, an activation or a cached key in bfloat16."""
_WITH_BIAS = ("qwen2",)
_WITH_HEAD_NORMS = ("qwen3",)


@dataclass(frozen=True)
class ModelShape:
    """A decoder with grouped-query attention and a gated MLP."""

    vocabulary: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    intermediate: int
    tied: bool
    attention_bias: bool = False
    head_norms: bool = False
    """Whether queries and keys are normalised, a weight for each unit of a head."""

    @property
    def layer_parameters(self) -> int:
        """Number of parameters of one layer."""
        attention = self.hidden * self.head_size * (2 * self.heads + 2 * self.kv_heads)
        if self.attention_bias:
            attention += self.head_size * (self.heads + 2 * self.kv_heads)
        if self.head_norms:
            attention += 2 * self.head_size
        return attention + 3 * self.hidden * self.intermediate + 2 * self.hidden

    @property
    def linear(self) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of a layer's matrices, by the names that most architectures use."""
        width, kv_width = self.heads * self.head_size, self.kv_heads * self.head_size
        hidden, intermediate = self.hidden, self.intermediate
        return {
            "q_proj": (hidden, width),
            "k_proj": (hidden, kv_width),
            "v_proj": (hidden, kv_width),
            "o_proj": (width, hidden),
            "gate_proj": (hidden, intermediate),
            "up_proj": (hidden, intermediate),
            "down_proj": (intermediate, hidden),
        }

    def adapter_parameters(self, rank: int, targets: str) -> int:
        """Number of parameters of adapters (`model.adapter`).

        Raises: `UserError` for a target that not all layers of such a model have.
        """
        names = list(self.linear) if targets == ALL_LINEAR else targets.replace(" ", "").split(",")
        if odd := [name for name in names if name not in self.linear]:
            raise UserError(
                f"model.adapter.targets: a plan knows {', '.join(self.linear)} alone, and cannot "
                f"count {odd[0]}{nearest(odd[0], list(self.linear))}"
            )
        return self.layers * rank * sum(sum(self.linear[name]) for name in set(names))

    @property
    def embedding(self) -> int:
        """Number of parameters of the embedding; as many as the output head has."""
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        embeddings = self.embedding * (1 if self.tied else 2)
        return self.layers * self.layer_parameters + embeddings + self.hidden

    def sampler_bytes(self, quantization: str | None) -> int:
        """Bytes of the weights in a generator; in eight bits a matrix of a layer has one each, and
        a float32 scale for each of its outputs."""
        if quantization is None:
            return BYTES * self.parameters
        sizes = self.linear.values()
        saved = sum((BYTES - 1) * inputs * outputs - 4 * outputs for inputs, outputs in sizes)
        return BYTES * self.parameters - self.layers * saved

    @property
    def kv_bytes(self) -> int:
        """Bytes of one token in the key-value cache."""
        return 2 * self.layers * self.kv_heads * self.head_size * BYTES


def shape_of_config(config: Mapping[str, Any]) -> ModelShape:
    """Read a shape from config.json; a multimodal model keeps its language model's apart."""
    config = {**config, **config.get("text_config", {})}
    heads, kind = config["num_attention_heads"], config.get("model_type")
    return ModelShape(
        vocabulary=config["vocab_size"],
        hidden=config["hidden_size"],
        layers=config["num_hidden_layers"],
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_size=config.get("head_dim") or config["hidden_size"] // heads,
        intermediate=config["intermediate_size"],
        tied=bool(config.get("tie_word_embeddings", False)),
        attention_bias=kind in _WITH_BIAS or bool(config.get("attention_bias", False)),
        head_norms=kind in _WITH_HEAD_NORMS,
    )
