"""Tasks whose credit is known exactly: a letter decides, and the policy is a Markov chain.

The model writes small letters, each drawn by the letter before it alone: its layers add nothing to
the embedding, and no other token can come. A completion is right when the letter at a place is one
of every second of the alphabet. So V(prefix) is a product of transition matrices, and the credit of
a token is V behind it less V before it: 0 but near the letter that decides.
"""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import LlamaForCausalLM

from deploy.models.tiny_model import build_model, build_tokenizer

Floats = npt.NDArray[np.float64]

LETTERS = string.ascii_lowercase
RIGHT = LETTERS[::2]
LENGTH = 8
PLACES = {"early": 0, "middle": 4, "late": 7}
"""The letter that decides, of eight."""
_SHARP = 6.0
"""Deviation of the logits of letters; their own deviation is one before."""
_NEVER = -1e4


def decided_by(text: str, reference: dict[str, Any], place: int = 0) -> float:
    """1 where the letter at `place` is a right one, else 0."""
    return float(text[place : place + 1] in tuple(RIGHT))


def build(folder: Path, seed: int = 0) -> LlamaForCausalLM:
    """Write the model into `folder`."""
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, seed)
    model.config.tie_word_embeddings = False
    draw = torch.Generator().manual_seed(seed)
    width = model.config.hidden_size
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        embedding = model.get_input_embeddings().weight
        embedding.copy_(torch.randn(embedding.shape, generator=draw))
        embedding[:, 0] = 1.0  # a direction that all tokens share
        head = torch.zeros(embedding.shape)
        ids = letter_ids(tokenizer)
        head[ids, 1:] = torch.randn(len(ids), width - 1, generator=draw) * _SHARP / width
        head[:, 0] = _NEVER
        head[ids, 0] = 0.0
        model.lm_head.weight = torch.nn.Parameter(head)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def letter_ids(tokenizer: Any) -> list[int]:
    """Token ids of the letters, in the order of the alphabet."""
    return [tokenizer(letter, add_special_tokens=False)["input_ids"][0] for letter in LETTERS]


class Chain:
    """The policy as a Markov chain, and the values that follow from it."""

    def __init__(self, model: LlamaForCausalLM, ids: list[int]) -> None:
        self._model, self._ids = model, ids
        self._transitions = self._rows(ids)
        self._right = np.array([letter in RIGHT for letter in LETTERS], dtype=np.float64)

    @torch.no_grad()
    def _rows(self, last: list[int]) -> Floats:
        """Probabilities of the letters behind each of some tokens, [tokens, letters]."""
        logits = self._model(input_ids=torch.tensor(last)[:, None]).logits[:, -1]
        found: Floats = logits[:, self._ids].double().softmax(-1).numpy()
        return found

    def values(self, prompt: list[int], token_ids: list[int], place: int) -> list[float]:
        """V before each token of a completion whose letter at `place` decides."""
        letters = [self._ids.index(token) for token in token_ids]
        found = []
        for t in range(len(letters)):
            if t > place:
                found.append(float(self._right[letters[place]]))
                continue
            row = self._rows([(prompt + token_ids)[len(prompt) + t - 1]])
            for _ in range(place - t):
                row = row @ self._transitions
            found.append(float((row @ self._right)[0]))
        return found
