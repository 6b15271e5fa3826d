"""Tiny random models of many architectures, for the matrix of `tests/models`.

Hidden size 128, two layers or what the pattern of the architecture needs, matrices drawn wide, so
that what is left out shows. Windows and original rotary lengths are 32, which the rows exceed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerFast

VOCABULARY = 512
WINDOW = 32
LONGEST = 128
"""`model.max_length` of every case."""

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.06,
}
_WINDOWED = {"sliding_window": WINDOW}
_BOTH_KINDS = {"layer_types": ["sliding_attention", "full_attention"], **_WINDOWED}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
_LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0 + 0.05 * i for i in range(16)],
    "long_factor": [2.0 + 0.3 * i for i in range(16)],
    "original_max_position_embeddings": 64,
}
_THETA = {"rope_theta": 10000.0}
_EXPERTS: dict[str, Any] = {"num_experts": 8, "num_experts_per_tok": 2}
_SMALL_EXPERTS: dict[str, Any] = {**_EXPERTS, "moe_intermediate_size": 64}
_MLA: dict[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 512,  # with the next, the one size of vLLM's kernel on CPU
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 64,
    "first_k_dense_replace": 1,
}

_ONE_GROUP = {"n_group": 1, "topk_group": 1}


@dataclass(frozen=True)
class Architecture:
    """One line of the matrix."""

    config: str
    """Class of transformers."""
    changes: dict[str, Any] = field(default_factory=dict)
    """What differs from `_SIZES`; None takes a key away."""
    served: dict[str, Any] = field(default_factory=dict)
    """What to change for plain transformers to compute as vLLM serves it."""
    learner_refuses: str = ""
    """What the learner's error says, where it does not train this architecture."""
    engine_refuses: str = ""
    """What vLLM's error says, where it does not serve it on a CPU."""
    rounding: float = 2e-5
    """The largest gap to vLLM, nats a token in float32."""


def _gpt2_like(**more: Any) -> dict[str, Any]:
    return dict.fromkeys(
        ("intermediate_size", "num_key_value_heads", "max_position_embeddings"), None
    ) | {"n_positions": 256, **more}


ARCHITECTURES: dict[str, Architecture] = {
    "llama_tied": Architecture("LlamaConfig", {"tie_word_embeddings": True}),
    "llama_untied": Architecture("LlamaConfig"),
    "llama_biases": Architecture("LlamaConfig", {"attention_bias": True, "mlp_bias": True}),
    "llama_yarn": Architecture("LlamaConfig", {"rope_parameters": {**_YARN, **_THETA}}),
    "llama_llama3": Architecture("LlamaConfig", {"rope_parameters": {**_LLAMA3, **_THETA}}),
    "qwen2": Architecture("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen2_untied": Architecture("Qwen2Config"),
    "qwen3": Architecture("Qwen3Config", {"head_dim": 32}),
    "gemma": Architecture("GemmaConfig", {"head_dim": 32}),
    "gemma2": Architecture(
        "Gemma2Config",
        {
            "head_dim": 32,
            "query_pre_attn_scalar": 32,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 3.0,
            **_WINDOWED,
        },
    ),
    "gemma3": Architecture(
        "Gemma3TextConfig", {"head_dim": 32, "query_pre_attn_scalar": 32, **_BOTH_KINDS}
    ),
    "mistral": Architecture("MistralConfig", {"head_dim": 32, **_WINDOWED}),
    "ministral": Architecture("MinistralConfig", {"head_dim": 32, **_BOTH_KINDS}),
    "phi": Architecture("PhiConfig", {"num_key_value_heads": 4}),
    "phi3": Architecture("Phi3Config"),
    "phi3_window": Architecture("Phi3Config", _WINDOWED),
    "phi3_longrope": Architecture(
        "Phi3Config",
        {
            "rope_parameters": {**_LONGROPE, **_THETA},
            "original_max_position_embeddings": 64,
        },
        served={  # the long factors, whatever the length
            "rope_parameters": {**_LONGROPE, **_THETA, "short_factor": _LONGROPE["long_factor"]}
        },
    ),
    "gpt2": Architecture("GPT2Config", _gpt2_like()),
    "gpt_bigcode": Architecture("GPTBigCodeConfig", _gpt2_like()),
    "gptj": Architecture("GPTJConfig", _gpt2_like(rotary_dim=16), learner_refuses="disagrees"),
    "gpt_neox": Architecture("GPTNeoXConfig", {"num_key_value_heads": None}),
    "opt": Architecture(
        "OPTConfig",
        {"num_key_value_heads": None, "ffn_dim": 192, "word_embed_proj_dim": 128},
    ),
    "bloom": Architecture(
        "BloomConfig", {"num_key_value_heads": None}, learner_refuses="disagrees"
    ),
    "falcon": Architecture(
        "FalconConfig",
        {"num_key_value_heads": None, "new_decoder_architecture": False},
        learner_refuses="cannot score packed rows",
    ),
    "mpt": Architecture(
        "MptConfig",
        {"d_model": 128, "n_heads": 4, "n_layers": 2, "max_seq_len": 256},
        learner_refuses="cannot score packed rows",
    ),
    "olmo": Architecture("OlmoConfig"),
    "olmo2": Architecture("Olmo2Config"),
    "olmo3": Architecture("Olmo3Config", _BOTH_KINDS),
    "granite": Architecture(
        "GraniteConfig",
        {
            "logits_scaling": 4.0,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.5,
            "attention_multiplier": 0.1,
        },
    ),
    "cohere": Architecture("CohereConfig", {"logit_scale": 0.25}),
    "cohere2": Architecture(
        "Cohere2Config",
        {"logit_scale": 0.25, **_BOTH_KINDS},
        served={"sliding_window": WINDOW + 1},
    ),
    "smollm3": Architecture("SmolLM3Config"),
    "starcoder2": Architecture("Starcoder2Config", _WINDOWED),
    "helium": Architecture("HeliumConfig", {"head_dim": 32}),
    "glm": Architecture("GlmConfig", {"head_dim": 32}),
    "glm4": Architecture("Glm4Config", {"head_dim": 32}),
    "exaone4": Architecture("Exaone4Config", _BOTH_KINDS),
    "seed_oss": Architecture("SeedOssConfig", {"head_dim": 32}),
    "arcee": Architecture("ArceeConfig"),
    "apertus": Architecture(  # vLLM holds two numbers of its activation in bfloat16
        "ApertusConfig", rounding=1e-3
    ),
    "ernie4_5": Architecture("Ernie4_5Config", {"head_dim": 32}),
    "hunyuan": Architecture("HunYuanDenseV1Config", {"head_dim": 32}),
    "stablelm": Architecture("StableLmConfig", learner_refuses="drops arguments"),
    "nemotron": Architecture("NemotronConfig", learner_refuses="drops arguments"),
    # A key that transformers does not read, and vLLM's Transformers backend does.
    "persimmon": Architecture("PersimmonConfig", {"num_key_value_heads": None}),
    "mixtral": Architecture("MixtralConfig", {"num_local_experts": 8, "num_experts_per_tok": 2}),
    "qwen2_moe": Architecture(
        "Qwen2MoeConfig", {**_SMALL_EXPERTS, "shared_expert_intermediate_size": 64}
    ),
    "qwen3_moe": Architecture("Qwen3MoeConfig", {**_SMALL_EXPERTS, "head_dim": 32}),
    "qwen3_moe_padded": Architecture(  # experts' width is no multiple of what the kernel wants
        "Qwen3MoeConfig", {**_SMALL_EXPERTS, "head_dim": 32, "moe_intermediate_size": 72}
    ),
    "olmoe": Architecture("OlmoeConfig", _EXPERTS),
    "granitemoe": Architecture(
        "GraniteMoeConfig",
        {"num_local_experts": 8, "num_experts_per_tok": 2, "logits_scaling": 4.0},
    ),
    "granitemoe_shared": Architecture(
        "GraniteMoeSharedConfig",
        {"num_local_experts": 8, "num_experts_per_tok": 2, "shared_intermediate_size": 64},
    ),
    "phimoe": Architecture(
        "PhimoeConfig",
        {"num_local_experts": 8, "num_experts_per_tok": 2},
        engine_refuses="too many values to unpack",  # in its Transformers backend
    ),
    "deepseek_v2": Architecture(
        "DeepseekV2Config",
        {**_MLA, "q_lora_rank": None, **_ONE_GROUP},
    ),
    "deepseek_v3": Architecture(
        "DeepseekV3Config",
        {
            **_MLA,
            "n_group": 2,
            "topk_group": 1,
            "topk_method": "noaux_tc",
            "scoring_func": "sigmoid",
        },
    ),
    "glm4_moe": Architecture(
        "Glm4MoeConfig",
        {
            "head_dim": 32,
            "moe_intermediate_size": 64,
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
        },
    ),
    "ernie4_5_moe": Architecture(
        "Ernie4_5_MoeConfig",
        {
            "moe_num_experts": 8,
            "moe_k": 2,
            "moe_intermediate_size": 64,
            "moe_num_shared_experts": 1,
            "moe_layer_start_index": 1,
        },
    ),
    "flex_olmo": Architecture("FlexOlmoConfig", _EXPERTS),
    "gpt_oss": Architecture(
        "GptOssConfig",
        {"head_dim": 32, "num_local_experts": 8, "num_experts_per_tok": 2, **_BOTH_KINDS},
        learner_refuses="attention sinks",
    ),
    "mamba": Architecture("MambaConfig", {"state_size": 8}, learner_refuses="disagrees"),
    "lfm2": Architecture(
        "Lfm2Config", {"layer_types": ["conv", "full_attention"]}, learner_refuses="disagrees"
    ),
    "qwen3_next": Architecture(
        "Qwen3NextConfig",
        {
            **_SMALL_EXPERTS,
            "head_dim": 32,
            "shared_expert_intermediate_size": 64,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 32,
            "linear_value_head_dim": 32,
        },
        learner_refuses="disagrees",
    ),
}


def config_of(name: str) -> PretrainedConfig:
    """The tiny configuration of an architecture."""
    case = ARCHITECTURES[name]
    keys = {key: value for key, value in (_SIZES | case.changes).items() if value is not None}
    return getattr(transformers, case.config)(**keys)


def random_model(name: str, seed: int = 0) -> Any:
    """A model with weights wide enough for errors to show; vectors are drawn too."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config_of(name), dtype=torch.float32).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.dim() == 1 and not key.endswith(("A_log", "dt_bias", ".D")):
                parameter.add_(0.1 * torch.randn_like(parameter))
        for key, buffer in model.named_buffers():
            if key.endswith("e_score_correction_bias"):
                buffer.copy_(0.1 * torch.randn_like(buffer))
    return model


def save_model(folder: Path, name: str, seed: int = 0) -> Path:
    """Write model and tokenizer as transformers does."""
    random_model(name, seed).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def plain_model(folder: Path, name: str) -> Any:
    """transformers' own model of a folder, with plain attention, computing as vLLM serves it."""
    return AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation="eager",
        **ARCHITECTURES[name].served,
    ).eval()


def tokenizer() -> PreTrainedTokenizerFast:
    """A word for every id, so that any sequence of ids is a text."""
    words = {f"w{index}": index for index in range(VOCABULARY)}
    inner = Tokenizer(models.WordLevel(words, unk_token="w3"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="w1", eos_token="w2", pad_token="w0"
    )
