"""Rows of pure functions: the trace, packing."""

from __future__ import annotations

import time

import numpy as np
import torch
from harness import Row, emit, ratio_of_times
from learner_models import trajectories

from learner.algorithm.traces import LambdaTrace, PackedAxis
from learner.policy.packing import pack_microbatch, plan_packing
from learner.policy.step_batch import StepBatch
from learner.training.heap import keep_freed_memory

TRACE_TOKENS, SEQUENCES = 32_768, 256  # 32 MiB: a copy within the cache touches no memory


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
    values, cells, tokens = [], 0, 0
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
        for segments in (s for rank in plan.microbatches for s in rank):
            row = pack_microbatch(batch, segments, "cpu")
            cells += len(row.layout.cell_rows)
            tokens += row.input_ids_1T.numel()
    detail = f"2 ranks, who wait; {tokens / cells:.0%} of what attention computes are tokens"
    return Row("packing efficiency, log-normal lengths", "1", values, 0.95, True, detail)


if __name__ == "__main__":
    torch.set_num_threads(1)
    emit([trace(), packing()])
