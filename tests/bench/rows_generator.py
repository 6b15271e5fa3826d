"""The generator actor against vLLM offline, and how long a weight update stops it.

The tiny model is the hard case: a token costs it so little that everything else shows.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import ray
from harness import CONFIGS, Row, emit
from workload import without_end

os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
from whole_groups import Begun, batches_behind

from actors.generation.generator import Generator
from common.config.load import load_config
from common.supervision.calls import Handle, ask, ask_pair, get_all, put, start_actor
from common.trajectory import GroupRequest
from common.weights.buckets import pack_tensors
from deploy.models.resolve import ModelLocation, resolve_model
from deploy.placement.cpu_runtime import preload_libraries
from deploy.placement.options import actor_options, plan_here
from deploy.run.actors import ActorFactory, connect, disconnect

GROUPS, SIZE, TOKENS, REPEATS = 32, 8, 96, 5


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        emit(measure(without_end(resolve_model("builtin:tiny-chain-sum"), Path(name))))


def measure(folder: str) -> list[Row]:
    config = load_config([CONFIGS / "tiny.yaml"], [f"model.path={folder}"], CONFIGS / "recipes")
    cores = plan_here(config, preload_libraries())
    connect(config, cores)
    factory = ActorFactory(
        config, cores, cuda=False, version=0, locate=ModelLocation(folder, folder)
    )
    generator = factory.generator("generator-0", folder)
    get_all([ask(generator, Generator.start)], 300)
    draw = np.random.default_rng(0)
    prompts = [draw.integers(3, 250, 24).tolist() for _ in range(GROUPS)]
    # The same environment, threads and cores as the actor's.
    options = actor_options(config, cores, cuda=False).generator | {"num_cpus": 0}
    offline = start_actor(Offline, options, folder, cores.generator_cores[0])
    rates: dict[str, list[float]] = {"actor": [], "offline": []}
    for repeat in range(REPEATS + 1):
        (plain,) = get_all([ask(offline, Offline.rate, prompts)], 300)
        ours = actor_rate(generator, prompts, repeat)
        if repeat:
            rates["offline"].append(plain)
            rates["actor"].append(ours)
    stalls, copies = publish_stalls(generator, folder, prompts)
    get_all([ask(generator, Generator.shutdown)], 30)
    disconnect(Path("/tmp"))
    return [
        Row(
            "generator actor, tokens per second, tiny model",
            "vLLM offline, the same batch and kernels",
            [a / b for a, b in zip(rates["actor"], rates["offline"], strict=True)],
            0.85,
            True,
            f"{statistics.median(rates['actor']):.0f} against "
            f"{statistics.median(rates['offline']):.0f} tokens/s, {GROUPS} x {SIZE}",
        ),
        Row(
            "stall of generation per publish, tiny model",
            "copy of the weights + 20 ms",
            [stall / (copy + 0.02) for stall, copy in zip(stalls, copies, strict=True)],
            2.0,
            False,
            f"{1e3 * statistics.median(stalls):.0f} ms; the copy alone takes "
            f"{1e3 * statistics.median(copies):.1f} ms",
        ),
    ]


class Offline:
    """`LLM.generate`, engine and worker in one process; an actor only to have its environment.

    Its norms are ours (`actors.generation.cpu_kernels`): the row is about what an actor adds to an
    engine.
    """

    def __init__(self, folder: str, cores: list[int] | None) -> None:
        if cores:
            os.sched_setaffinity(0, cores)
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        from vllm import LLM

        from actors.generation.cpu_kernels import IR_OP_PRIORITY

        self._llm = LLM(
            folder,
            dtype="float32",
            max_model_len=128,
            max_num_seqs=256,
            enforce_eager=True,
            block_size=32,
            kv_cache_memory_bytes=2**28,
            distributed_executor_backend="uni",
            disable_log_stats=True,
            ir_op_priority=IR_OP_PRIORITY,
        )

    def rate(self, prompts: list[list[int]]) -> float:
        from vllm import SamplingParams

        sampling = SamplingParams(
            n=SIZE, temperature=1.0, max_tokens=TOKENS, logprobs=0, detokenize=False
        )
        self._llm.reset_prefix_cache()
        started = time.perf_counter()
        done = self._llm.generate(
            [{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False
        )
        tokens = sum(len(output.token_ids) for each in done for output in each.outputs)
        return tokens / (time.perf_counter() - started)


def ask_groups(generator: Handle[Generator], prompts: list[list[int]], first: int) -> list[Begun]:
    """Every group asked for at once, as the loop does."""
    return [
        ask_pair(
            generator,
            Generator.generate_group,
            GroupRequest(
                first + i, first + i, "p", 0, "?", "?", ids, "{}", SIZE, TOKENS, 1.0, 0, time.time()
            ),
        )
        for i, ids in enumerate(prompts)
    ]


def actor_rate(generator: Handle[Generator], prompts: list[list[int]], repeat: int) -> float:
    """Tokens a second, until the batches are in the object store."""
    started = time.perf_counter()
    stored = batches_behind(generator, ask_groups(generator, prompts, GROUPS * repeat), 600)
    ray.wait(stored, num_returns=len(stored), timeout=60, fetch_local=False)
    taken = time.perf_counter() - started
    batches = ray.get(stored)
    return sum(len(batch.column("token_ids").flatten()) for batch in batches) / taken


def publish_stalls(
    generator: Handle[Generator], folder: str, prompts: list[list[int]]
) -> tuple[list[float], list[float]]:
    """(seconds generation stood still, seconds to copy the same bytes), a repeat each.

    Groups are under way during every update, and go on after it.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    tensors = [(n, p.detach()) for n, p in model.named_parameters()]
    buckets = list(pack_tensors(iter(tensors), 2**26))
    stored = [bucket.at(put(bucket.buffer)) for bucket in buckets]
    stalls, copies = [], []
    for version in range(1, REPEATS + 2):
        begun = ask_groups(generator, prompts, 1000 * version)
        time.sleep(0.3)
        (stall,) = get_all([ask(generator, Generator.update_weights, stored, version)], 120)
        batches_behind(generator, begun, 600)
        started = time.perf_counter()
        for bucket in buckets:
            np.array(np.frombuffer(bucket.buffer, np.uint8))
        copied = time.perf_counter() - started
        if version > 1:
            stalls.append(stall)
            copies.append(copied)
    return stalls, copies


if __name__ == "__main__":
    main()
