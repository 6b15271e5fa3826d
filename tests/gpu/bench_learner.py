"""The learner alone on one GPU: tokens per second, share of the device's matrix peak, memory.

    python tests/gpu/bench_learner.py [--model 7B] [--attention varlen] [--tokens 32768]

Needs torch and transformers (and the numpy these bring), nothing else. The shape is that of
Qwen2.5-1.5B or 7B, with random weights in bfloat16; a micro-batch is packed from completions of
1,024 tokens behind shared prompts; a step is forward, GRPO-lambda's loss (trace, clip) and
backward, with activation checkpointing. The peak is measured: the fastest of large bfloat16
products on this device. Attention and recomputed layers are work that the share of the peak does
not count. There is no optimiser: its two moments and the float32 weights come on top of the memory
named here.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, Qwen2Config

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from learner.algorithm.traces import LambdaTrace, PackedAxis
from learner.policy.model import Policy, checkpoint_activations, use_varlen
from learner.policy.packing import PackedRow, pack_row

PROMPT, GROUP = 256, 8
CHUNK = 2048


def seconds(work: Callable[[], object], device: str, repeats: int) -> float:
    """Median wall time of `work`, the device idle before and after."""
    times = []
    for index in range(repeats + 1):
        wait(device)
        started = time.perf_counter()
        work()
        wait(device)
        if index:
            times.append(time.perf_counter() - started)
    return statistics.median(times)


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def matrix_peak(device: str, dtype: torch.dtype, size: int, repeats: int) -> float:
    """FLOP/s of the fastest square product."""
    best = 0.0
    for side in (size, size // 2):
        a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
        best = max(best, 2 * side**3 / seconds(lambda a=a, b=b: a @ b, device, repeats))
    return best


SHAPES: dict[str, dict[str, Any]] = {
    "1.5B": {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "7B": {
        "hidden_size": 3584,
        "intermediate_size": 18_944,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
    },
}


def build(shape: str, layers: int, vocabulary: int, dtype: torch.dtype, device: str) -> Policy:
    config = Qwen2Config(
        **SHAPES[shape],
        vocab_size=vocabulary,
        num_hidden_layers=layers,
        max_position_embeddings=32_768,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    policy = Policy(model, CHUNK)
    checkpoint_activations(policy.layers)
    return policy


def row_of(tokens: int, completion: int, vocabulary: int, device: str) -> PackedRow:
    """Groups of at most `GROUP` completions, each behind one prompt, until the row is full."""
    draw = np.random.default_rng(0)
    parts, left = [], tokens
    while (count := min(GROUP, (left - PROMPT) // completion)) > 0:
        answers = list(draw.integers(5, vocabulary, (count, completion)))
        parts.append((draw.integers(5, vocabulary, PROMPT), answers))
        left -= PROMPT + count * completion
    if not parts:
        raise SystemExit(f"--tokens {tokens} holds no completion of {completion} behind {PROMPT}")
    return pack_row(parts, range(sum(len(answers) for _, answers in parts)), device)


def step(policy: Policy, row: PackedRow, axis: PackedAxis, advantages_B: torch.Tensor) -> None:
    logprobs_N, _ = policy.logprobs(row, temperature=1.0)
    log_ratio_N = logprobs_N - logprobs_N.detach()
    ratio_N = LambdaTrace(axis, "recent", 0.99).apply(log_ratio_N).exp()
    advantages_N = axis.spread(advantages_B)
    clipped_N = ratio_N.clamp(0.8, 1.2) * advantages_N
    (-torch.minimum(ratio_N * advantages_N, clipped_N).mean()).backward()
    policy.model.zero_grad(set_to_none=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--attention", default="grids", choices=("grids", "varlen"))
    parser.add_argument("--model", default="1.5B", choices=SHAPES)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--tokens", type=int, default=32_768)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--completion", type=int, default=1024, help="tokens of each")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--matrix", type=int, default=8192)
    options = parser.parse_args()
    device, repeats = options.device, options.repeats
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit(
            "no CUDA device here; --device cpu --layers 1 --tokens 2048 tries the script"
        )
    dtype = getattr(torch, options.dtype)
    peak = matrix_peak(device, dtype, options.matrix, repeats)
    policy, row = (
        build(options.model, options.layers, options.vocabulary, dtype, device),
        row_of(options.tokens, options.completion, options.vocabulary, device),
    )
    if options.attention == "varlen":
        use_varlen(policy, torch.device(device), temperature=1.0)
    axis = PackedAxis(torch.tensor(row.lengths, device=device))
    advantages_B = torch.randn(len(row.lengths), device=device)
    took = seconds(lambda: step(policy, row, axis, advantages_B), device, repeats)
    x_N = torch.randn(len(row.labels_M), device=device, requires_grad=True)
    trace = LambdaTrace(axis, "recent", 0.99)
    traced = seconds(lambda: trace.apply(x_N).sum().backward(), device, repeats)
    tokens = row.input_ids_1T.numel()
    matrices = sum(p.numel() for n, p in policy.model.named_parameters() if "embed" not in n)
    head = policy.head.weight.numel()
    # 2 forward and 4 backward a weight; recomputed activations are not counted as useful work.
    useful = 6.0 * (matrices * tokens + head * len(row.labels_M))
    result = {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "torch": torch.__version__,
        "model": options.model,
        "attention": options.attention,
        "layers": options.layers,
        "packed_tokens": tokens,
        "step_s": took,
        "tokens_per_s": tokens / took,
        "matrix_peak_tflops": peak / 1e12,
        "mfu_of_measured_peak": useful / took / peak,
        "trace_share": traced / took,
        "peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else None,
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
