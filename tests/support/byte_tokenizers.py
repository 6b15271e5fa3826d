"""Tokenizers of one token a byte, with a chat template of their own."""

from __future__ import annotations

from typing import Any

CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def byte_tokenizer(chat_template: str | None = CHAT) -> Any:
    """A real fast tokenizer, a token a byte, that puts `<s>` before any text."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<s>": 0} | {letter: i for i, letter in enumerate(letters, 1)}
    tokenizer = Tokenizer(BPE(vocabulary, []))
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    fast: Any = PreTrainedTokenizerFast  # untyped in transformers
    fast = fast(tokenizer_object=tokenizer, bos_token="<s>")
    fast.chat_template = chat_template
    return fast
