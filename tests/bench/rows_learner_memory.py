"""Peak memory of the learner's forward and backward, 8k tokens under a vocabulary of 150k."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import torch
from harness import Row, emit, peak_kib
from transformers import AutoModelForCausalLM, LlamaConfig

from learner.policy.model import Policy
from learner.policy.packing import pack_row

TOKENS, VOCABULARY, CHUNK = 8192, 150_000, 512


def build() -> torch.nn.Module:
    """Wide enough for its head to be a small part of the memory of its logits, as it always is."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=TOKENS + 1,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model: torch.nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model


def step(chunked: bool) -> None:
    """In a process of its own: weights, gradients and activations of one completion, GiB."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    before = peak_kib()
    model = build()
    ids = np.random.default_rng(1).integers(5, VOCABULARY, TOKENS + 1)
    if chunked:
        row = pack_row([(ids[:1], [ids[1:]])], range(1), "cpu")
        logprobs_N, _ = Policy(model, CHUNK).logprobs(row, temperature=1.0)
    else:
        whole = torch.from_numpy(ids)[None]
        logprobs_1TV = model(input_ids=whole[:, :-1], use_cache=False).logits.log_softmax(-1)
        logprobs_N = logprobs_1TV.gather(-1, whole[:, 1:, None]).flatten()
    logprobs_N.mean().backward()
    print((peak_kib() - before) / 2**20, float(logprobs_N.detach().double().sum()))


def peak(chunked: bool) -> tuple[float, float]:
    """(GiB, sum of log-probabilities)."""
    command = [sys.executable, __file__, "chunked" if chunked else "whole"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    gib, total = done.stdout.splitlines()[-1].split()
    return float(gib), float(total)


def main() -> None:
    whole, expected = peak(chunked=False)
    ours, found = peak(chunked=True)
    if abs(found / expected - 1) > 1e-4:
        raise SystemExit(f"not the same work: log-probabilities add up to {found} and {expected}")
    emit(
        [
            Row(
                "peak memory of the learner, 8k tokens, vocabulary 150k, a Llama of 42M parameters",
                "log_softmax of transformers' logits",
                [ours / whole],
                0.5,
                False,
                f"{ours:.2f} against {whole:.2f} GiB: weights, gradients, activations",
            )
        ]
    )


if __name__ == "__main__":
    if len(sys.argv) > 1:
        step(sys.argv[1] == "chunked")
    else:
        main()
