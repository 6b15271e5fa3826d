"""Memory that a run needs, estimated before anything starts.

    learner, all ranks   float32 weights and gradients and what the optimiser keeps, which makes 16
                         bytes a parameter with AdamW's two moments; plus the gathered compute copy,
                         on every rank
    checkpoint           the same without gradients, and a compute copy, from when it is taken until
                         it is written
    generator, each      compute weights and the key-value cache
    weights on the way   three copies in compute dtype: bucket, object store, the version before,
                         which is kept for generators that start again
    every process        the libraries it imports

Activations are not counted: they follow from `batch.tokens_per_microbatch` and are smaller. An
evaluation has generators alone.
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass, replace
from pathlib import Path

from common.errors import UserError
from deploy.placement.config import ActorConfig
from learner.training.optimizer import state_bytes

GIB = 2**30
_FLOAT32 = 4
_PROCESS_BYTES = {"learner": 0.5 * GIB, "generator": 1.5 * GIB, "others": 1.5 * GIB}
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
    config: ActorConfig, parameters: int, *, has_reference: bool = False
) -> MemoryEstimate:
    """Estimate the memory of a run or an evaluation on a CPU.

    Args:
        parameters: how many the model has.
        has_reference: the learner holds the model that the run began from, too (a KL term).
    """
    width = 2 if config.model.dtype == "bfloat16" else 4
    compute = parameters * width
    each = compute + config.generator.kv_cache_gib * GIB + _PROCESS_BYTES["generator"]
    serving = MemoryEstimate(config.generator.count * each, _PROCESS_BYTES["others"])
    if config.learner is None:
        return serving
    kept = state_bytes(config.learner)
    return replace(
        serving,
        learner=parameters * (2 * _FLOAT32 + kept)
        + (compute if has_reference else 0)
        + config.learner.ranks * (compute + _PROCESS_BYTES["learner"]),
        checkpoint=parameters * (_FLOAT32 + kept + width),
        transfer=(2 + config.generator.count) * compute,
    )


def count_parameters(folder: Path) -> int:
    """Count the parameters of a model folder, from the headers of its safetensors files."""
    total = 0
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            total += math.prod(entry["shape"])
    return total


def available_bytes() -> int:
    """Bytes that can be had without swapping (Linux); 0 where that is not known."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 0
    sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
    return sizes.get("MemAvailable", 0)


def check_memory(config: ActorConfig, folder: Path, *, has_reference: bool) -> None:
    """Raise `UserError` when this machine cannot hold what `estimate` counts."""
    needed = estimate(config, count_parameters(folder), has_reference=has_reference)
    available = available_bytes()
    if available and needed.total > available:
        raise UserError(
            f"this run needs about {needed.total / GIB:.1f} GiB and {available / GIB:.1f} GiB are "
            "available:\n  "
            + "\n  ".join(needed.lines())
            + "\nUse a smaller model, lower generator.kv_cache_gib or generator.count, or end "
            "other programs"
        )
