"""Cores and Ray resources of every actor.

With `max_staleness: 0` generators and learner take turns, so each may use every core. Otherwise
both work at once. From four cores on they get disjoint ones, so that they never fight for one. On
fewer both use all of them. Threads sleep while they wait instead of spinning, and the operating
system divides the time.

SmolLM2 on two cores: a step took 10.4 s with shared cores, 12.4 s in turns, about 15 s with a core
each, because the learner has twice the work (AVX-512, means of four steps, one run each). With AVX2
it took 28, 38 and 32 s (medians of four steps, one run each, on a noisy machine).
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, TypeVar

from common.errors import UserError
from deploy.placement.config import ActorConfig, num_ranks
from deploy.placement.cores import available_cores, core_quota

C = TypeVar("C", bound=ActorConfig)

MIB = 2**20
_FEWEST_TO_DIVIDE = 4
_CLUSTER_THREADS = 4
"""CPU threads of an actor on a cluster, where its work is on a GPU."""
LOG_OPTIONS: dict[str, object] = {"num_cpus": 0.1}


@dataclass(frozen=True)
class CorePlan:
    """Cores of each generator and learner rank; None where the operating system decides."""

    generator_cores: list[list[int] | None]
    generator_threads: int
    learner_cores: list[list[int] | None]
    learner_threads: int
    reason: str
    preload: list[str] = field(default_factory=list)
    """Libraries for LD_PRELOAD of the generators."""


def plan_here(config: ActorConfig, preload: list[str]) -> CorePlan:
    """Divide the cores of this machine, as `plan_cores` does.

    Under a quota below the number of cores nothing is bound to a core, since others may have been
    given the same ones. There are then as many threads as if the quota were the number of cores.
    """
    cores, quota = available_cores(), core_quota()
    if quota is None or quota >= len(cores):
        return plan_cores(config, cores, preload)
    plan = plan_cores(config, cores[:quota], preload)
    return replace(
        plan,
        generator_cores=[None] * len(plan.generator_cores),
        learner_cores=[None] * len(plan.learner_cores),
        reason=f"{plan.reason}; none bound, for a quota of {quota}",
    )


def plan_cores(config: ActorConfig, cores: list[int], preload: list[str]) -> CorePlan:
    """Divide `cores` between generators and learner ranks; on a cluster Ray gives them."""
    generators, ranks = config.generator.count, num_ranks(config)
    of_learner = config.learner.threads if config.learner else None
    if config.ray.address != "local":
        return CorePlan(
            generator_cores=[None] * generators,
            generator_threads=config.generator.threads or _CLUSTER_THREADS,
            learner_cores=[None] * ranks,
            learner_threads=of_learner or _CLUSTER_THREADS,
            reason="cores of a cluster",
            preload=preload,
        )
    wanted = config.placement.cores
    asynchronous = config.generator.max_staleness > 0
    if wanted == "split" and len(cores) < generators + ranks:
        raise UserError(
            f"placement.cores=split: {len(cores)} core(s) for {generators} generator(s) and "
            f"{ranks} learner rank(s); use auto or shared"
        )
    enough = len(cores) >= max(_FEWEST_TO_DIVIDE, generators + ranks)
    if wanted == "split" or (wanted == "auto" and asynchronous and enough):
        half = max(generators, len(cores) // 2) if ranks else len(cores)
        half = min(half, len(cores) - ranks)
        generator_cores = _deal(cores[:half], generators)
        learner_cores = _deal(cores[half:], ranks)
        reason = "disjoint cores"
    else:
        generator_cores = [list(cores)] * generators
        learner_cores = [list(cores)] * ranks
        reason = "all cores to each in turn" if not asynchronous else "cores shared"
        if asynchronous and not enough:
            reason += ", too few to divide"
    return CorePlan(
        generator_cores=list(generator_cores),
        generator_threads=config.generator.threads or _threads(generator_cores, generators),
        learner_cores=list(learner_cores),
        learner_threads=of_learner or _threads(learner_cores, ranks),
        reason=reason,
        preload=preload,
    )


def _deal(cores: list[int], parts: int) -> list[list[int]]:
    return [cores[part::parts] for part in range(parts)]


def _threads(cores: list[list[int]], sharing: int) -> int:
    """Threads of each of `sharing` processes of one kind, at most one a core."""
    shared = sharing > 1 and cores[0] == cores[1]
    fewest = min(map(len, cores), default=0)
    return max(1, fewest // sharing if shared else fewest)


def uses_cuda(config: ActorConfig) -> bool:
    """Whether this run is on CUDA devices, which its learner decides if it has one."""
    if config.learner is not None and config.learner.device != "auto":
        return config.learner.device == "cuda"
    import torch

    return torch.cuda.is_available()


def with_compute_dtype(config: C) -> C:
    """Resolve `model.dtype: auto` for this machine."""
    if config.model.dtype != "auto":
        return config
    native = uses_cuda(config) or cpu_multiplies_bfloat16()
    dtype: Literal["bfloat16", "float32"] = "bfloat16" if native else "float32"
    return replace(config, model=replace(config.model, dtype=dtype))


def cpu_multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions that multiply bfloat16.

    Without them a bfloat16 product took 6 to 8 times the float32 one (AVX2).
    """
    import torch

    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


@dataclass(frozen=True)
class ActorOptions:
    """Arguments of `ray.remote(...).options` for each kind of actor."""

    generator: dict[str, object]
    learner: dict[str, object]
    verifier: dict[str, object]
    environment: dict[str, object]
    teacher: dict[str, object]


def actor_options(config: ActorConfig, cores: CorePlan, cuda: bool) -> ActorOptions:
    """Give the actors their Ray resources and environment variables."""
    of_generator, of_rank = gpus_each(config) if cuda else (0.0, 0.0)
    generator: dict[str, object] = {
        "num_cpus": cores.generator_threads,
        "num_gpus": of_generator,
        "max_concurrency": 1000,
        "runtime_env": {"env_vars": _generator_environment(config, cores, cuda)},
    }
    return ActorOptions(
        generator=generator,
        teacher=generator | {"num_gpus": float(config.teacher.tensor_parallel) if cuda else 0.0},
        learner={
            "num_cpus": cores.learner_threads,
            "num_gpus": of_rank,
            "runtime_env": {"env_vars": _learner_environment(config, cores, cuda)},
        },
        verifier={"num_cpus": 0.5, "max_concurrency": 1000},
        environment={
            "num_cpus": config.environment.num_cpus,
            "max_concurrency": 1000,
            "max_restarts": -1,  # whose episodes fail one after the other ends by its verdicts
            "runtime_env": {"env_vars": _NO_DEVICE},
        },
    )


_NO_DEVICE = {"CUDA_VISIBLE_DEVICES": ""}
"""Ray leaves every device visible to an actor that asks for none. vLLM would take one uncounted."""


def _generator_environment(config: ActorConfig, cores: CorePlan, cuda: bool) -> dict[str, str]:
    variables = {
        "OMP_NUM_THREADS": str(cores.generator_threads),
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),
        "VLLM_NO_USAGE_STATS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        **config.transport.generator_environment,
        **_network(config),
    }
    if cuda:
        return variables
    if cores.preload:
        variables["LD_PRELOAD"] = ":".join(cores.preload)
    return variables | {
        **_NO_DEVICE,
        "OMP_WAIT_POLICY": "PASSIVE",
        # vLLM would bind its threads to cores of its own choice; the actor has bound them already.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        # oneDNN keeps a compiled product of a quarter MiB for each size of vLLM's batch. Its
        # default of 1024 let generators grow by 240 MiB over 500 steps; 256 cost no CPU time.
        "ONEDNN_PRIMITIVE_CACHE_CAPACITY": os.environ.get("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256"),
    }


def _learner_environment(config: ActorConfig, cores: CorePlan, cuda: bool) -> dict[str, str]:
    variables = {
        "OMP_NUM_THREADS": str(cores.learner_threads),
        "TOKENIZERS_PARALLELISM": "false",
        **_network(config),
    }
    if not cuda:
        return variables | {
            **_NO_DEVICE,
            "OMP_WAIT_POLICY": "PASSIVE",
            # Steps and checkpoints run in two threads. A thread's own arena could not keep freed
            # blocks of more than 64 MiB, so there is one for all (`learner.training.heap`).
            "MALLOC_ARENA_MAX": "1",
            # Huge pages, where the kernel gives them on request: 6 % of a step on two cores.
            "GLIBC_TUNABLES": os.environ.get("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1"),
        }
    if not config.transport.shares_devices:
        # Micro-batches differ in shape, and fixed blocks of memory fit few of the next ones. What
        # is shared with a generator by CUDA's handles must be such a block.
        chosen = os.environ.get("PYTORCH_ALLOC_CONF", "expandable_segments:True")
        variables["PYTORCH_ALLOC_CONF"] = chosen
    return variables


def _network(config: ActorConfig) -> dict[str, str]:
    """Have gloo and NCCL meet over the interface that the configuration names."""
    names = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
    return dict.fromkeys(names, config.ray.interface) if config.ray.interface else {}


def gpus_each(config: ActorConfig) -> tuple[float, float]:
    """CUDA devices of a generator and of a learner rank; where they take turns, half of one."""
    share = 0.5 if config.transport.shares_devices else 1.0
    return share * (config.generator.num_gpus or config.generator.devices), share


def devices_wanted(config: ActorConfig) -> float:
    """CUDA devices that all generators, teachers and learner ranks ask Ray for."""
    of_generator, of_rank = gpus_each(config)
    of_teachers = config.teacher.count * config.teacher.tensor_parallel
    return config.generator.count * of_generator + num_ranks(config) * of_rank + of_teachers


def environment_actors(config: ActorConfig) -> int:
    """Actors in which episodes are played; 0 where they are played beside their generators."""
    environment = config.environment
    pooled = environment.name is not None and environment.placement == "actors"
    return environment.workers if pooled else 0


def cpus_needed(config: ActorConfig, cores: CorePlan) -> int:
    """Logical CPUs of a cluster of our own, where actors that take turns count twice."""
    needed = (
        (len(cores.generator_cores) + config.teacher.count) * cores.generator_threads
        + len(cores.learner_cores) * cores.learner_threads
        + config.verifier.workers
        + math.ceil(environment_actors(config) * config.environment.num_cpus)
        + 1
    )
    return max(needed, len(available_cores()))


def object_store_bytes(config: ActorConfig) -> int:
    """Bytes of the object store of a cluster of our own, within what shared memory can hold."""
    wanted = int(config.ray.object_store_gib * 1024 * MIB)
    shared_memory = Path("/dev/shm")
    if shared_memory.exists():
        stat = os.statvfs(shared_memory)
        wanted = min(wanted, int(stat.f_bavail * stat.f_frsize * 0.5))
    return wanted
