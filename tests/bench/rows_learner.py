"""The learner against bare PyTorch on the same packed tokens."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from harness import Row, emit, ratio_of_times
from learner_models import trajectories
from transformers import AutoModelForCausalLM, LlamaConfig

from common.config.algorithm import AdvantageConfig, AlgorithmConfig, CreditConfig
from common.config.sections import LearnerConfig, ModelConfig
from learner.algorithm.traces import LambdaTrace, PackedAxis
from learner.policy.packing import pack_microbatch
from learner.policy.step_batch import StepBatch
from learner.training.job import LearnerJob
from learner.training.rank import LearnerRank

VOCABULARY = 16_384


def model_folder(folder: Path) -> Path:
    """A Llama of 30M parameters, random."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    return folder


def worker(folder: Path, algorithm: AlgorithmConfig | None = None) -> LearnerRank:
    job = LearnerJob(
        model=ModelConfig(path=str(folder), dtype="float32"),
        reference_path=str(folder),
        learner=LearnerConfig(
            device="cpu",
            learning_rate=1e-5,
            packing="sequence",
            threads=len(os.sched_getaffinity(0)),
            credit_probe_every=0,
        ),
        algorithm=algorithm or AlgorithmConfig(credit=CreditConfig(kind="lambda_trace")),
        correction_kind="tis",
        max_completion_tokens=512,
        temperature=1.0,
        seed=0,
        total_steps=100,
        primary_verifier="test",
        bucket_mib=64,
        tokens_per_microbatch=2048,
    )
    made = LearnerRank(job, 0, put=lambda buffer: buffer)  # type: ignore[arg-type,return-value]
    made.setup(*made.rendezvous_address())
    return made


def loss(model: Any, hidden_NH: torch.Tensor, labels_N: torch.Tensor) -> None:
    """Cross entropy and its backward pass: no optimiser, nothing of ours."""
    torch.nn.functional.cross_entropy(model.lm_head(hidden_NH), labels_N).backward()


def sequences(groups: list[pa.RecordBatch]) -> list[tuple[torch.Tensor, int]]:
    """(prompt and completion, length of the prompt) of every completion."""
    rows = [row for group in groups for row in group.to_pylist()]
    return [
        (torch.tensor(row["prompt_ids"] + row["token_ids"]), len(row["prompt_ids"])) for row in rows
    ]


def scorer_row(folder: Path, groups: list[pa.RecordBatch]) -> Row:
    """A step without a scorer takes `time/rank_train` less `time/score` of one that has it."""
    scored = AlgorithmConfig(
        advantage=AdvantageConfig(kind="distill", scorer="reference", args={"reward_weight": 1.0})
    )
    made = worker(folder, scored)
    shares, passes = [], []
    for count in range(6):
        metrics = made.step(groups, 0, 0)
        rest_s = metrics["time/rank_train"] - metrics["time/score"]
        if count:  # the first makes the optimiser
            shares.append(metrics["time/score"] / rest_s)
            passes.append(metrics["time/score"])
    made.shutdown()
    return Row(
        "scorer, share of a learner step",
        "the step without it, of the same model's size",
        shares,
        0.4,
        False,
        f"{statistics.median(passes):.2f} s for one forward pass over all completions",
    )


def main() -> None:
    draw = np.random.default_rng(0)
    shapes = [(40, draw.integers(60, 200, 8).tolist()) for _ in range(4)]
    groups = trajectories(shapes, vocabulary=VOCABULARY)
    with tempfile.TemporaryDirectory() as name:
        folder = model_folder(Path(name))
        made = worker(folder)
        batch = StepBatch.from_record_batches(groups)
        plan = made.trainer._plan(batch, np.ones(len(batch.group_B), dtype=np.bool_))
        rows = [pack_microbatch(batch, segments, "cpu") for segments in plan.microbatches[0]]
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        singles = sequences(groups)
        tokens = sum(row.input_ids_1T.numel() for row in rows)

        def as_rows() -> None:
            """The rows as they are, without boundaries: attention reads too far back."""
            model.zero_grad()
            for row in rows:
                hidden = model.model(input_ids=row.input_ids_1T, use_cache=False)[0][0]
                loss(model, hidden[row.predictor_rows_M], row.labels_M)

        def one_by_one() -> None:
            """A sequence at a time, no attention too many but small products."""
            model.zero_grad()
            for ids, prompt in singles:
                hidden = model.model(input_ids=ids[None], use_cache=False)[0][0]
                loss(model, hidden[prompt - 1 : -1], ids[prompt:])

        against_rows = ratio_of_times(
            lambda: made.step(groups, 0, 0), as_rows, 4, time.perf_counter
        )
        against_single = ratio_of_times(
            lambda: made.step(groups, 0, 0), one_by_one, 4, time.perf_counter
        )
        # The better of two ways to write it without this project.
        ratios, ours, plain = min(against_rows, against_single, key=lambda timed: timed[2])
        axis = PackedAxis(torch.from_numpy(batch.lengths_B))
        x_N = torch.randn(len(batch.token_ids)).requires_grad_()
        shares = []
        for _ in range(10):
            started = time.perf_counter()
            LambdaTrace(axis, "recent", 0.99).apply(x_N).sum().backward()
            shares.append((time.perf_counter() - started) / ours)
        made.shutdown()
        of_scorer = scorer_row(folder, groups)
    emit(
        [
            of_scorer,
            Row(
                "learner, packed tokens per second",
                "bare forward and backward, the better of rows and single sequences",
                [1 / ratio for ratio in ratios],
                0.85,
                True,
                f"{tokens / ours:.0f} against {tokens / plain:.0f} tokens/s, optimiser included",
            ),
            Row(
                "λ-trace, share of a learner step",
                "the step",
                shares,
                0.01,
                False,
                f"{1e3 * statistics.median(shares) * ours:.2f} ms of {ours:.2f} s",
            ),
        ]
    )


if __name__ == "__main__":
    main()
