"""A learner step with adapters (LoRA) against one that trains all weights: seconds and memory.

Each in processes of its own, in turns: a Llama of 30M parameters in bfloat16 where this machine
multiplies in it, 32 completions of 64 tokens behind prompts of 32.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from harness import Row, emit, peak_kib
from learner_models import trajectories
from learner_ranks import worker
from rows_learner import model_folder

from common.config.sections import AdapterConfig
from deploy.placement.options import cpu_multiplies_bfloat16

RANK, REPEATS, STEPS = 8, 3, 4
GROUPS = [(32, [64] * 8)] * 4


def step(folder: Path, rank: int) -> None:
    """In a process of its own: prints seconds of its later steps, and peak memory in MiB."""
    dtype = "bfloat16" if cpu_multiplies_bfloat16() else "float32"
    seconds, before = [], peak_kib()
    with worker(folder, adapter=AdapterConfig(rank=rank), dtype=dtype) as made:
        for number in range(STEPS):
            metrics = made.step(trajectories(GROUPS, seed=number), number, number)
            seconds.append(metrics["time/rank_train"])
    later = seconds[1:]  # the first makes the optimiser
    print(json.dumps({"seconds": statistics.median(later), "mib": (peak_kib() - before) / 1024}))


def measured(folder: Path, rank: int) -> dict[str, float]:
    command = [sys.executable, __file__, str(folder), str(rank)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = model_folder(Path(name))
        pairs = [(measured(folder, RANK), measured(folder, 0)) for _ in range(REPEATS)]
    units = {"seconds": ("seconds of a learner step", "s"), "mib": ("peak memory of it", "MiB")}
    rows = []
    for key, (what, unit) in units.items():
        adapted, whole = (statistics.median(pair[of][key] for pair in pairs) for of in (0, 1))
        rows.append(
            Row(
                f"{what} with adapters of rank {RANK}, a Llama of 30M parameters",
                "training all weights",
                [a[key] / b[key] for a, b in pairs],
                1.0,
                False,
                f"{adapted:.3g} against {whole:.3g} {unit}",
            )
        )
    emit(rows)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        step(Path(sys.argv[1]), int(sys.argv[2]))
    else:
        main()
