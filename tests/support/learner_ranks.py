"""Learner ranks that a test feeds by hand, in its own process or in one for each rank."""

from __future__ import annotations

import multiprocessing as mp
import queue
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from learner_models import trajectories

from common.config.algorithm import AlgorithmConfig
from common.config.sections import AdapterConfig, LearnerConfig, ModelConfig
from common.weights.buckets import unpack_tensors
from common.weights.transport import Receivers
from learner.policy.packing import pack_row, split_by_length
from learner.training.job import LearnerJob
from learner.training.rank import LearnerRank
from learner.weights.canary import largest_gap

if TYPE_CHECKING:
    from engine_beside import EngineBeside

SHAPES = [(9, [5, 12, 3, 7]), (4, [20, 2]), (17, [3, 3, 8]), (6, [10] * 4)]
DEADLINE_S = 120.0
_PRELOADED = ["transformers.models.llama.modeling_llama", "learner.training.rank"]
"""What ranks import: ten seconds of a processor, once for all of a test process."""


def make_worker(folder: Path, rank: int = 0, ranks: int = 1, **changes: Any) -> LearnerRank:
    """A rank that is not set up; `changes` are keys of the learner, the objective or the job."""
    learner = LearnerConfig(ranks=ranks, device="cpu", warmup_steps=0, learning_rate=1e-3)
    algorithm = AlgorithmConfig()
    for name, value in changes.items():
        section = learner if hasattr(learner, name) else algorithm.objective
        if hasattr(section, name):
            setattr(section, name, value)
    job = LearnerJob(
        model=ModelConfig(
            path=str(folder),
            dtype=changes.get("dtype", "float32"),
            max_length=changes.get("max_length", 512),
            adapter=changes.get("adapter", AdapterConfig()),
        ),
        reference_path=str(changes.get("reference", folder)),
        teacher_path=changes.get("teacher"),
        learner=learner,
        algorithm=changes.get("algorithm", algorithm),
        correction_kind=changes.get("correction_kind", "tis"),
        max_completion_tokens=48,
        temperature=changes.get("temperature", 0.9),
        seed=0,
        total_steps=10,
        primary_verifier="test",
        bucket_mib=1,
        tokens_per_microbatch=changes.get("tokens_per_microbatch", 64),
        publish=changes.get("publish", "merged"),
    )
    return LearnerRank(job, rank, put=lambda buffer: buffer)


@contextmanager
def worker(folder: Path, **changes: Any) -> Iterator[LearnerRank]:
    """A single rank, ready to step in this process."""
    made = make_worker(folder, **changes)
    made.setup(*made.rendezvous_address())
    try:
        yield made
    finally:
        made.shutdown()


def on_policy(of: LearnerRank, groups: Sequence[pa.RecordBatch]) -> list[pa.RecordBatch]:
    """The groups with log-probabilities as if the policy of the rank, at temperature 1, had
    sampled them."""
    found = []
    for group in groups:
        rows = group.to_pylist()
        ids = [row["prompt_ids"] + row["token_ids"] for row in rows]
        logprobs = of.score(ids, [len(row["prompt_ids"]) for row in rows])
        place = group.schema.get_field_index("behaviour_logprobs")
        column = pa.array(logprobs, group.schema.field(place).type)
        found.append(group.set_column(place, "behaviour_logprobs", column))
    return found


def weights(of: LearnerRank) -> dict[str, torch.Tensor]:
    """The weights that the rank would publish."""
    of.open_transport(Receivers([], 1, 1.0))
    buckets = of.export_weights(0).buckets
    pairs = [pair for bucket in buckets for pair in unpack_tensors(bucket, bucket.buffer)]
    return {name: tensor.clone() for name, tensor in pairs}


def moments(of: LearnerRank) -> dict[str, np.ndarray]:
    """AdamW's first moments, full: linear in the gradients, unlike the weights they move."""
    (optimizer,) = of.trainer.optimizers
    state = optimizer.state
    named = of.trainer.policy.model.named_parameters()
    return {name: state[p]["exp_avg"].full_tensor().numpy() for name, p in named if p in state}


def train_work(
    made: LearnerRank, steps: int = 2, credit_run: str | None = None
) -> tuple[list[dict], dict, dict]:
    """Train on `steps` batches; returns (metrics of each step, weights, AdamW's moments)."""
    metrics = [made.step(trajectories(SHAPES, seed=s), s, s, credit_run) for s in range(steps)]
    exported = {name: tensor.float().numpy() for name, tensor in weights(made).items()}
    return metrics, exported, moments(made)


def train(folder: Path, steps: int = 2, **changes: Any) -> tuple[list[dict], dict, dict]:
    """`train_work` of a fresh rank."""
    with worker(folder, **changes) as made:
        return train_work(made, steps)


def _rank_main(rank: int, ranks: int, pipe, target: Callable, args: tuple) -> None:
    address, results = pipe
    try:
        torch.set_num_threads(1)
        made, work = target(rank, ranks, *args)
        if rank == 0:
            place = made.rendezvous_address()
            for _ in range(ranks - 1):
                address.put(place)
        else:
            place = address.get(timeout=DEADLINE_S)
        made.setup(*place)
        results.put((rank, work(made), None))
        made.shutdown()
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
        raise


def on_ranks(ranks: int, target: Callable, *args: Any) -> list[Any]:
    """`target(rank, ranks, *args)` -> (worker, work) runs in its own process on every rank."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    pipe = (context.Queue(), context.Queue())
    processes = [
        context.Process(target=_rank_main, args=(r, ranks, pipe, target, args), daemon=True)
        for r in range(ranks)
    ]
    for process in processes:
        process.start()
    results = {}
    try:
        for _ in processes:
            rank, result, error = pipe[1].get(timeout=DEADLINE_S)
            assert error is None, f"rank {rank} failed:\n{error}"
            results[rank] = result
    except queue.Empty:
        silent = sorted(set(range(ranks)) - set(results))
        raise TimeoutError(f"ranks {silent} gave no result within {DEADLINE_S} s") from None
    finally:
        for process in processes:
            process.join(timeout=10 if len(results) == ranks else 0)
            if process.is_alive():
                process.terminate()
                process.join(timeout=10)
    return [results[rank] for rank in range(ranks)]


def sampled_gap(
    of: LearnerRank,
    engine: EngineBeside,
    prompts: list[list[int]],
    temperature: float,
    max_tokens: int,
) -> float:
    """Nats a token between what an engine said as it sampled, and the learner; the largest of the
    completions' means."""
    sampled = engine.sample(prompts, temperature=temperature, max_tokens=max_tokens)
    groups = [
        (np.array(prompt), [np.array(tokens)])
        for prompt, (tokens, _) in zip(prompts, sampled, strict=True)
    ]
    row = pack_row(groups, range(len(groups)), "cpu")
    with torch.no_grad():
        ours_N, _ = of.trainer.policy.logprobs(row, temperature=temperature)
    ours = split_by_length(ours_N.tolist(), row.lengths)
    return largest_gap(ours, [scores for _, scores in sampled])


def untimed(metrics: dict[str, float]) -> dict[str, float]:
    """The metrics that do not depend on how fast the machine is."""
    return {name: value for name, value in metrics.items() if not name.startswith("time/")}


def assert_same_training(found, expected) -> None:
    """Both are results of `train`: the same numbers but for rounding."""
    for mine, theirs in zip(found[0], expected[0], strict=True):
        for name in ("loss/policy", "grad_norm", "clip_fraction", "is_ratio/mean"):
            assert mine[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6), name
    for name, moment in expected[2].items():
        np.testing.assert_allclose(found[2][name], moment, atol=1e-4 * np.abs(moment).max(), rtol=0)
    # AdamW divides by the gradient's own size, so an element whose gradient is rounding noise may
    # go anywhere within a learning rate (1e-3); a wrong gradient moves most elements that far.
    for name, weight in expected[1].items():
        gap = np.abs(found[1][name] - weight)
        assert gap.max() < 2e-4 and gap.mean() < 1e-6, name
