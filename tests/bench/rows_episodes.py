"""Episodes of three turns against vLLM with the same turns, and what a turn costs beside sampling.

The environment does nothing. vLLM is given the same tokens between turns of the same lengths, all
episodes a turn at a time. It waits for no environment and renders nothing. The model is SmolLM2; a
name behind the script takes another: `builtin:tiny-guess` costs so little that all else shows.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import ray
from harness import CONFIGS, Row, emit
from transformers import AutoTokenizer

os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
from whole_groups import batches_behind

from actors.data.chat import Template
from actors.environments.guess import tasks
from actors.environments.host import EnvironmentHost
from actors.generation.engine import Completion
from actors.generation.episodes import Player
from actors.generation.generator import Generator
from actors.rendering.renderer import Renderer
from common.config.load import load_config
from common.config.sections import Config
from common.supervision.calls import Handle, ask, ask_pair, get_all, start_actor
from common.trajectory import GroupRequest
from deploy.models.resolve import ModelLocation, resolve_model
from deploy.placement.cpu_runtime import preload_libraries
from deploy.placement.options import actor_options, plan_here, with_compute_dtype
from deploy.run.actors import ActorFactory, connect, disconnect

GROUPS, SIZE, TURNS, TOKENS, REPEATS = 2, 8, 3, 12, 3
ALONE = 40
"""Episodes of the row on a turn's overhead, one after the other."""
TARGET_MS = 5.0
MODEL = "builtin:smollm2-135m-instruct"
LENGTH, COMPLETION = 512, 400


def main() -> None:
    model = sys.argv[1] if len(sys.argv) > 1 else MODEL
    keys = (
        f"model.path={model}",
        "environment.name=null_environment:Null",
        f"environment.max_turns={TURNS}",
        f"environment.turn_tokens={TOKENS}",
        f"model.max_length={LENGTH}",
        f"generator.max_completion_tokens={COMPLETION}",
    )
    preset = CONFIGS / "smollm2-calculator.yaml"
    config = with_compute_dtype(load_config([preset], list(keys), CONFIGS / "recipes"))
    emit([throughput(config), asyncio.run(overhead(config))])


def throughput(config: Config) -> Row:
    name = config.model.path
    folder = str(resolve_model(name))
    cores = plan_here(config, preload_libraries())
    connect(config, cores)
    locate = ModelLocation(folder, folder)
    factory = ActorFactory(config, cores, cuda=False, version=0, locate=locate)
    generator = factory.generator("generator-0", folder)
    options = actor_options(config, cores, cuda=False).generator | {"num_cpus": 0}
    offline = start_actor(Turns, options, folder, config.model.dtype, cores.generator_cores[0])
    get_all([ask(generator, Generator.start)], 300)
    ratios, ours, bare = [], [], []
    for repeat in range(REPEATS + 1):
        seconds, batches = play(generator, requests(config, repeat))
        (alone,) = get_all([ask(offline, Turns.seconds, turns_of(batches))], 300)
        if repeat:
            ours.append(GROUPS * SIZE / seconds)
            bare.append(GROUPS * SIZE / alone)
            ratios.append(alone / seconds)
    get_all([ask(generator, Generator.shutdown)], 30)
    disconnect(Path("/tmp"))
    return Row(
        f"episodes of {TURNS} turns per second, {name.partition(':')[2]}",
        "vLLM offline with the same turns and tokens, a turn at a time",
        ratios,
        0.85,
        True,
        f"{statistics.median(ours):.1f} against {statistics.median(bare):.1f} episodes/s, "
        f"{GROUPS} x {SIZE}",
    )


@cache
def tokenizer_of(name: str) -> Any:
    """From the model's folder: seconds less than from the package it comes in."""
    return AutoTokenizer.from_pretrained(str(resolve_model(name)))


def requests(config: Config, repeat: int) -> list[GroupRequest]:
    """Groups of the guessing game's questions."""
    template = Template(config.data, tokenizer_of(config.model.path))
    asked = [task["prompt"] for task, _ in zip(tasks(), range(GROUPS), strict=False)]
    return [
        GroupRequest(
            number, number, str(number), 0, "?", "?", ids, "{}", SIZE, COMPLETION, 1.0, 0, now
        )
        for number, ids in enumerate(template.encode_asked(asked), GROUPS * repeat)
        for now in [time.time()]
    ]


def play(
    generator: Handle[Generator], asked: list[GroupRequest]
) -> tuple[float, list[pa.RecordBatch]]:
    """Seconds until the batches are in the object store, and the batches."""
    started = time.perf_counter()
    begun = [ask_pair(generator, Generator.generate_group, request) for request in asked]
    stored = batches_behind(generator, begun, 600)
    ray.wait(stored, num_returns=len(stored), timeout=60, fetch_local=False)
    return time.perf_counter() - started, ray.get(stored)


def turns_of(batches: list[pa.RecordBatch]) -> list[list[tuple[list[int], int]]]:
    """Of every episode and turn: the tokens given before it, and how many were sampled."""
    found = []
    for row in [row for batch in batches for row in batch.to_pylist()]:
        ids, heard, turns = row["prompt_ids"] + row["token_ids"], 0, []
        for turn in row["turns"]:
            begin, end = (len(row["prompt_ids"]) + turn[key] for key in ("begin", "end"))
            turns.append((ids[heard:begin], end - begin))
            heard = end
        found.append(turns)
    return found


class Turns:
    """`LLM.generate`, a call a turn; an actor only to have a generator's environment."""

    def __init__(self, folder: str, dtype: str, cores: list[int] | None) -> None:
        if cores:
            os.sched_setaffinity(0, cores)
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        from vllm import LLM

        from actors.generation.cpu_kernels import IR_OP_PRIORITY

        self._llm = LLM(
            folder,
            dtype=dtype,
            max_model_len=LENGTH,
            max_num_seqs=256,
            enforce_eager=True,
            block_size=32,
            kv_cache_memory_bytes=2**29,
            distributed_executor_backend="uni",
            disable_log_stats=True,
            ir_op_priority=IR_OP_PRIORITY,
        )

    def seconds(self, episodes: list[list[tuple[list[int], int]]]) -> float:
        from vllm import SamplingParams

        started = time.perf_counter()
        contexts = list[list[int]]([] for _ in episodes)
        for number in range(max(map(len, episodes))):
            playing = [index for index, turns in enumerate(episodes) if number < len(turns)]
            prompts, sampling = list[Any](), []
            for index in playing:
                given, length = episodes[index][number]
                contexts[index] += given
                prompts.append({"prompt_token_ids": contexts[index]})
                sampling.append(
                    SamplingParams(
                        temperature=1.0,
                        max_tokens=length,
                        ignore_eos=True,
                        logprobs=0,
                        detokenize=False,
                    )
                )
            for index, said in zip(
                playing, self._llm.generate(prompts, sampling, use_tqdm=False), strict=True
            ):
                contexts[index] = contexts[index] + list(said.outputs[0].token_ids)
        return time.perf_counter() - started


async def overhead(config: Config) -> Row:
    """What the player, the renderer and the environment's process take, where sampling is free."""
    tokenizer: Any = tokenizer_of(config.model.path)
    host = EnvironmentHost(config.environment)
    await host.start()
    renderer = Renderer.start(tokenizer, config.data, roles=[config.environment.role])
    said = tokenizer("4")["input_ids"] + [tokenizer.eos_token_id]

    async def sample(name: str, ids: list[int], sampling: dict[str, Any]) -> Completion:
        return Completion(list(said), [-1.0] * len(said), [0] * len(said), "stop")

    player = Player(config.environment, host, renderer, tokenizer, sample, LENGTH)
    request = requests(config, 0)[0]
    busy, clock = list[float](), list[float]()
    for repeat in range(REPEATS + 1):
        began, worked, count = time.perf_counter(), processor_s(host), 0
        for index in range(ALONE):
            episode = await player.play(request, repeat * ALONE + index, {}, seeded=False)
            count += len(episode.turns)
        busy.append(1e3 * (processor_s(host) - worked) / count)
        clock.append(1e3 * (time.perf_counter() - began) / count)
    await host.shutdown()
    return Row(
        "overhead of a turn, an environment that does nothing",
        f"{TARGET_MS:g} ms of processor",
        [each / TARGET_MS for each in busy[1:]],
        1.0,
        False,
        f"{statistics.median(busy[1:]):.2f} ms, a quarter of its process's start and end in it; "
        f"{statistics.median(clock[1:]):.1f} ms by the clock of this machine, one at a time",
    )


def processor_s(host: EnvironmentHost) -> float:
    """Seconds of processor of this process, of the environment's and of those it has ended."""
    of_worker = psutil.Process(host.pids[0]).cpu_times()
    return time.process_time() + sum(of_worker)


if __name__ == "__main__":
    main()
