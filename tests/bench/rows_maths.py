"""Rows of pure functions: the trace, packing, the fused log-probability head."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import numpy as np
import torch
from harness import Row, emit, peak_kib, ratio_of_times
from learner_models import trajectories

from learner.heap import keep_freed_memory
from learner.logprobs import HeadRequest, chunked_logprobs
from learner.packing import StepBatch, plan_packing
from learner.traces import LambdaTrace, PackedAxis

TRACE_TOKENS, SEQUENCES = 32_768, 256  # 32 MiB: a copy within the cache touches no memory
HEAD_TOKENS, VOCABULARY, HIDDEN = 8192, 150_000, 64


def trace() -> Row:
    """GRPO-lambda's trace forward and backward over completions of 32k tokens, as a rank has it."""
    keep_freed_memory()
    axis = PackedAxis(torch.full((SEQUENCES,), TRACE_TOKENS))
    inputs_N = torch.randn(SEQUENCES * TRACE_TOKENS).requires_grad_()
    gradient_N = torch.randn_like(inputs_N.detach())
    target_N = torch.empty_like(gradient_N)

    def traced() -> None:
        inputs_N.grad = None
        LambdaTrace(axis, "recent", 0.99).apply(inputs_N).backward(gradient_N)

    ratios, ours, copy = ratio_of_times(
        traced, lambda: target_N.copy_(gradient_N), 7, time.perf_counter
    )
    return Row(
        f"λ-trace, forward and backward, {SEQUENCES} x 32k tokens",
        "one read and write of the same memory",
        ratios,
        20.0,
        False,
        f"{1e3 * ours:.0f} ms against {1e3 * copy:.1f} ms",
    )


def packing() -> Row:
    """64 groups of 8 completions, log-normal lengths around 400 tokens, 8k-token rows."""
    values = []
    for seed in range(5):
        draw = np.random.default_rng(seed)
        shapes = [
            (
                int(draw.integers(40, 200)),
                np.minimum(draw.lognormal(6, 0.8, 8), 4000).astype(int).tolist(),
            )
            for _ in range(64)
        ]
        batch = StepBatch.from_record_batches(trajectories(shapes))
        plan = plan_packing(
            batch,
            np.ones(len(batch.group_B), dtype=np.bool_),
            ranks=2,
            budget=8192,
            share_prefix=True,
            pairs_per_token=6.0 * 1536,
        )
        values.append(plan.efficiency)
    return Row(
        "packing efficiency, log-normal lengths", "1", values, 0.95, True, "2 ranks, who wait"
    )


def head_peak(chunk: int, tokens: int) -> float:
    """Peak memory of a process that scores `tokens` under a vocabulary of 150k, GiB."""
    command = [sys.executable, __file__, str(chunk), str(tokens)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout.splitlines()[-1])


def score(chunk: int, tokens: int) -> None:
    """In a process of its own: forward and backward, chunked or (0) as everyone writes it."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    hidden_NH = torch.randn(tokens, HIDDEN, requires_grad=True)
    weight_VH = torch.randn(VOCABULARY, HIDDEN, requires_grad=True)
    labels_N = torch.randint(VOCABULARY, (tokens,))
    before = peak_kib()
    if chunk:
        request = HeadRequest(torch.arange(tokens), labels_N, 1.0, False)
        logprobs_N, _ = chunked_logprobs(hidden_NH, weight_VH, None, request, chunk)
    else:
        logits_NV = torch.nn.functional.linear(hidden_NH, weight_VH)
        logprobs_N = logits_NV.log_softmax(-1).gather(1, labels_N[:, None])[:, 0]
    logprobs_N.sum().backward()
    print((peak_kib() - before) / 2**20)


def head() -> Row:
    # All logits of 8k tokens and what backward makes of them would not fit 24 GiB: a half, doubled.
    whole = 2 * head_peak(0, HEAD_TOKENS // 2)
    ours = [head_peak(512, HEAD_TOKENS) for _ in range(3)]
    return Row(
        "peak memory of the learner's head, 8k tokens, vocabulary 150k",
        "log_softmax of all logits",
        [peak / whole for peak in ours],
        0.5,
        False,
        f"{ours[0]:.2f} GiB against {whole:.2f} GiB (twice that of 4k) beyond inputs",
    )


if __name__ == "__main__":
    if len(sys.argv) > 1:
        score(int(sys.argv[1]), int(sys.argv[2]))
    else:
        torch.set_num_threads(1)
        emit([trace(), packing(), head()])
