"""The tiny preset: a model small enough to train and serve on one laptop core.

`build_tokenizer`: one token a byte, and one for the sentence that opens every question.
`build_model`: a Llama of 0.9 million parameters with fresh weights.
`build_tiny`: both, after the warm start of `deploy.models.warm_start`, as a Hugging Face folder.

It is a Llama and not a Qwen2, because transformers gives every Qwen2 folder its own tokenizer
class, which changes the text and adds a token.
"""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from deploy.models.warm_start import warm_start

END, PAD = "<|end|>", "<|pad|>"

OPENING = "State the final answer to the following arithmetic problem:"
"""reasoning-gym's wording of `chain_sum`. As one token it makes a prompt a fifth as long."""

CONTEXT = 512


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer without merges: any text can be encoded and decoded exactly."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(OPENING, normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def build_model(
    tokenizer: PreTrainedTokenizerFast, seed: int, width: int = 128, layers: int = 4
) -> LlamaForCausalLM:
    """A Llama with fresh float32 weights drawn from `seed`; its heads are 32 wide.

    The vocabulary is padded to a multiple of 64; ids past the tokenizer's are never trained.
    """
    config = LlamaConfig(
        vocab_size=-(-len(tokenizer) // 64) * 64,
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 32,
        max_position_embeddings=CONTEXT,
        bos_token_id=None,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).float()


def build_teacher(folder: Path) -> None:
    """Write a teacher of the tiny model: of 2.2 times its weights, and shown no hasty answer.

    It reads the same tokens, and is warm-started twice as long.
    """
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, 1, width=192)
    warm_start(model, tokenizer, 1, times=2, careful=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def build_tiny(folder: Path, seed: int = 0, terms: int = 3, times: int = 1) -> None:
    """Write the warm-started model and its tokenizer into `folder`; about a minute on one core.

    Args:
        terms: digits of the sums that it is warm-started on.
        times: how much longer than usual it is warm-started.
    """
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, seed)
    warm_start(model, tokenizer, seed, terms, times=times)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
