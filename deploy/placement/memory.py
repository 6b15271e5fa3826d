"""Memory that a run needs, estimated before anything starts.

    learner, all ranks   float32 weights and gradients and what the optimiser keeps, which makes 16
                         bytes a parameter with AdamW's two moments; plus the gathered compute copy,
                         on every rank; with adapters (`model.adapter`) the 16 bytes are theirs
                         alone, and the other weights stay in compute dtype; a critic has weights
                         and optimiser of its own, a moving average four bytes a parameter;
                         bfloat16 weights and moments in 8 bit take two each
    checkpoint           the same without gradients, and a compute copy, from when it is taken until
                         it is written
    generator, each      compute weights, those of matrices in eight bits where they are quantised,
                         and the key-value cache; where adapters are sent alone
                         (`weights.publish`), room for them at vLLM's rank, and a copy
    weights on the way   three copies in compute dtype: bucket, object store, the version before,
                         which is kept for generators that start again; adapters alone in float32
    every process        the libraries it imports

Activations are not counted: they follow from `batch.tokens_per_microbatch` and are smaller. An
evaluation has generators alone.
"""

from __future__ import annotations

import json
import math
import re
import struct
from dataclasses import dataclass, replace
from pathlib import Path

from common.config.data import ALL_LINEAR, AdapterConfig
from common.errors import UserError
from deploy.placement.config import ActorConfig
from learner.training.memory import ALONE, OtherModels
from learner.training.optimizer import MASTERS, state_bytes

GIB = 2**30
_IN_LAYER = re.compile(r"\.\d+\.")
_FLOAT32 = 4
PROCESS_BYTES = {"learner": 0.5 * GIB, "generator": 1.5 * GIB, "others": 1.5 * GIB}
"""Bytes of the libraries a process imports, rounded up from process listings."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Memory in bytes, by what needs it, on a machine that holds the whole run."""

    generators: float
    others: float
    learner: float = 0.0
    checkpoint: float = 0.0
    transfer: float = 0.0

    @property
    def total(self) -> float:
        return self.learner + self.checkpoint + self.generators + self.transfer + self.others

    def lines(self) -> list[str]:
        """The estimate as lines of text, in GiB."""
        rows = {
            "learner": self.learner,
            "checkpoint": self.checkpoint,
            "generators": self.generators,
            "weights on the way": self.transfer,
            "other processes": self.others,
            "in all": self.total,
        }
        return [f"{name:<22} {size / GIB:.1f} GiB" for name, size in rows.items()]


def estimate(
    config: ActorConfig,
    parameters: int,
    others: OtherModels = ALONE,
    *,
    adapters: int = 0,
    taught: int = 0,
    quantised: int = 0,
) -> MemoryEstimate:
    """Estimate the memory of a run or an evaluation on a CPU.

    Args:
        parameters: how many the model has.
        others: what the learner holds beside the policy.
        adapters: parameters of adapters, where they alone are trained; 0 where all are.
        taught: parameters of a teacher that has generators of its own.
        quantised: parameters that generators hold in a byte each.
    """
    width = 2 if config.model.dtype == "bfloat16" else 4
    compute = parameters * width
    each = config.generator.kv_cache_gib * GIB + PROCESS_BYTES["generator"]
    beside = config.teacher.count * (each + taught * width)
    published, served = float(compute), config.served_adapter
    if served is not None and adapters:
        published = _FLOAT32 * adapters
        each += 2 * width * served_parameters(served, adapters)
    sampling = config.generator.count * (each + compute - quantised * (width - 1))
    serving = MemoryEstimate(sampling + beside, PROCESS_BYTES["others"])
    if config.learner is None:
        return serving
    kept = state_bytes(config.learner, config.model.adapter.rank if adapters else 0)
    master = MASTERS[config.learner.masters].itemsize
    models = 2 if others.critic else 1
    trained, frozen = parameters, compute if others.reference else 0
    if adapters:  # the policy's frozen weights are the reference too; a critic has its own
        trained, frozen = adapters, models * compute
    average = trained * _FLOAT32 * others.average
    return replace(
        serving,
        learner=trained * (_FLOAT32 + models * (master + kept))  # gradients of one at a time
        + frozen
        + others.teacher * width
        + average
        + config.learner.ranks * (models * compute + PROCESS_BYTES["learner"]),
        checkpoint=models * trained * (master + kept) + average + compute,
        transfer=(2 + config.generator.count) * published,
    )


def served_parameters(adapter: AdapterConfig, trained: float) -> float:
    """Parameters for which vLLM makes room, whose ranks are its own, for so many of an adapter."""
    return trained * adapter.served_rank / adapter.rank


def count_parameters(folder: Path) -> int:
    """Count the parameters of a model folder, from the headers of its safetensors files."""
    return sum(math.prod(shape) for shape in _shapes(folder).values())


def count_quantised(folder: Path) -> int:
    """Count the parameters that int8 holds in a byte: matrices of layers that are no expert's."""
    return sum(
        math.prod(shape)
        for name, shape in _shapes(folder).items()
        if len(shape) == 2 and _IN_LAYER.search(name) and ".experts." not in name
    )


def count_adapters(folder: Path, adapter: AdapterConfig) -> int:
    """Count the parameters of adapters to a model folder: of the matrices in its layers."""
    matrices = {
        name.removesuffix(".weight"): shape
        for name, shape in _shapes(folder).items()
        if len(shape) == 2 and _IN_LAYER.search(name)
    }
    targets = [f".{target.strip()}" for target in adapter.targets.split(",")]
    wanted = (
        shape
        for name, shape in matrices.items()
        if adapter.targets == ALL_LINEAR or f".{name}".endswith(tuple(targets))
    )
    return adapter.rank * sum(map(sum, wanted))


def _shapes(folder: Path) -> dict[str, list[int]]:
    """Shapes of all tensors of a model folder, by name."""
    shapes: dict[str, list[int]] = {}
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
        shapes |= {n: entry["shape"] for n, entry in header.items() if n != "__metadata__"}
    return shapes


def available_bytes() -> int:
    """Bytes that can be had without swapping (Linux); 0 where that is not known."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 0
    sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
    return sizes.get("MemAvailable", 0)


def check_memory(config: ActorConfig, folder: Path, others: OtherModels) -> None:
    """Raise `UserError` when this machine cannot hold what `estimate` counts."""
    needed = estimate(
        config,
        count_parameters(folder),
        others,
        taught=count_parameters(Path(config.teacher.path or "")) if config.teacher.count else 0,
        adapters=count_adapters(folder, config.model.adapter),
        quantised=count_quantised(folder) if config.generator.quantization else 0,
    )
    available = available_bytes()
    if available and needed.total > available:
        raise UserError(
            f"this run needs about {needed.total / GIB:.1f} GiB and {available / GIB:.1f} GiB are "
            "available:\n  "
            + "\n  ".join(needed.lines())
            + "\nUse a smaller model, lower generator.kv_cache_gib or generator.count, or end "
            "other programs"
        )
