"""Tiny random models and made-up trajectories for the learner's tests."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Glm4MoeConfig,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)
from turn_columns import listed_answers

from common.record.schema import trajectory_schema

VOCABULARY = 97
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}
ARCHITECTURES = ("qwen2", "llama_tied", "llama_untied", "gemma2", "gpt_neox", "granite")


def tiny_config(name: str) -> PretrainedConfig:
    if name == "qwen2":
        return Qwen2Config(**_SIZES, num_key_value_heads=2, tie_word_embeddings=True)
    if name == "gpt_neox":
        return GPTNeoXConfig(**_SIZES, hidden_dropout=0.3)
    if name == "gemma2":  # soft caps on logits and scores, and a window shorter than the data
        return Gemma2Config(
            **_SIZES,
            num_key_value_heads=2,
            head_dim=16,
            query_pre_attn_scalar=16,
            sliding_window=8,
            attn_logit_softcapping=5.0,
            final_logit_softcapping=3.0,
            attn_implementation="eager",
        )
    if name == "glm4_moe":  # its routing bias is a buffer that checkpoints hold
        return Glm4MoeConfig(
            **_SIZES,
            num_key_value_heads=2,
            head_dim=16,
            moe_intermediate_size=32,
            n_routed_experts=8,
            num_experts_per_tok=2,
            n_shared_experts=1,
            first_k_dense_replace=1,
        )
    if name == "granite":
        return GraniteConfig(**_SIZES, num_key_value_heads=2, logits_scaling=4.0)
    return LlamaConfig(**_SIZES, num_key_value_heads=2, tie_word_embeddings=name == "llama_tied")


def tiny_model(name: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(tiny_config(name), dtype=dtype).eval()


def save_tiny_model(folder: Path, name: str = "llama_tied") -> Path:
    tiny_model(name).save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    return folder


def random_groups(
    shapes: Sequence[tuple[int, Sequence[int]]], seed: int = 0, vocabulary: int = VOCABULARY
) -> list[tuple[np.ndarray, list[np.ndarray]]]:
    """(prompt, completions) for (prompt length, completion lengths)."""
    random = np.random.default_rng(seed)
    return [
        (random.integers(3, vocabulary, p), [random.integers(3, vocabulary, n) for n in lengths])
        for p, lengths in shapes
    ]


def trajectories(
    shapes: Sequence[tuple[int, Sequence[int]]],
    *,
    seed: int = 0,
    version: int = 0,
    rewards: Sequence[Sequence[float | None]] | None = None,
    vocabulary: int = VOCABULARY,
) -> list[pa.RecordBatch]:
    """Record batches of made-up groups with a mix of rewards in every group."""
    random = np.random.default_rng(seed + 1)
    batches = []
    for g, (prompt, completions) in enumerate(random_groups(shapes, seed, vocabulary)):
        n = len(completions)
        scores = list(rewards[g]) if rewards else [float((i + g) % 2) for i in range(n)]
        columns: dict[str, list[Any]] = {
            "group_id": [g] * n,
            "ticket": [g] * n,
            "completion_index": list(range(n)),
            "prompt_id": [str(g)] * n,
            "epoch": [0] * n,
            "source": [""] * n,
            "question": [""] * n,
            "prompt_text": [""] * n,
            "reference": ["{}"] * n,
            "prompt_ids": [prompt.tolist()] * n,
            "text": [""] * n,
            "token_ids": [c.tolist() for c in completions],
            "behaviour_logprobs": [random.normal(-4.6, 0.3, len(c)).tolist() for c in completions],
            "weight_versions": [[version] * len(c) for c in completions],
            "loss_mask": [[True] * len(c) for c in completions],
            "guidance_length": [0] * n,
            "finish_reason": ["stop"] * n,
            **listed_answers([len(c) for c in completions]),
            "generator": ["g0"] * n,
            "dispatch_version": [version] * n,
            "dispatched_s": [0.0] * n,
            "finished_s": [0.0] * n,
            "reward/test": scores,
            "verdict/test": ["pass"] * n,
            "reward": scores,
            "accuracy": scores,
            "suspicious": [""] * n,
        }
        schema = trajectory_schema(["test"])
        batches.append(pa.RecordBatch.from_pydict(columns, schema=schema))
    return batches
