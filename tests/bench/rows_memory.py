"""(long) Memory and files of 2,000 tiny steps, of single answers and of episodes.

    python tests/bench/rows_memory.py [--steps 2000] [--preset tiny ...]

Resident memory of every process, at the end against that behind the first tenth. And what a step
adds to the files of a run, over the second half of its steps against the first.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import psutil
from harness import CONFIGS, ROOT, Row, emit

from common.record.metrics import read_metrics

STEPS = 2000
PRESETS: dict[str, tuple[str, ...]] = {
    "tiny": (),
    "tiny-guess": ("batch.prompts_per_step=4", "algorithm.objective.updates_per_batch=1"),
}
"""What is changed in a preset: episodes take long, and few of them show the same."""
WINDOW = 25
"""Steps over which the largest sample counts."""
KINDS = (
    "LearnerRank",
    "Generator",
    "VerifierWorker",
    "TrajectoryLogWriter",
    "EngineCore",  # with CUDA
    "deploy.cli",
    "sandbox",  # of the verifiers: where rules run
    "environments.child",
    "raylet",
    "gcs_server",
)
AGENTS = "Ray's agents"
"""What is left of Ray's: its agents of a node, and workers that wait for an actor."""
FILES = ("trajectories", "credit", "ledger.sqlite", "metrics.jsonl", "log")
"""What a run writes at every step; of checkpoints the newest stay."""

Sizes = dict[str, float]


def resident(root: psutil.Process) -> Sizes:
    """MiB of the run's processes by kind, children of a kind summed."""
    sizes: Sizes = defaultdict(float)
    for process in [root, *root.children(recursive=True)]:
        try:
            line = " ".join(process.cmdline())
            kind = next((kind for kind in KINDS if kind in line), AGENTS)
            sizes[kind] += process.memory_info().rss / 2**20
        except psutil.NoSuchProcess:
            continue
    return sizes


def written(run: Path) -> Sizes:
    """KiB of the files of a run, by name."""
    return {name: _bytes(run / name) / 2**10 for name in FILES}


def _bytes(path: Path) -> int:
    """On the disk, of a file or of all files in a folder: a text's old part is given back."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(512 * file.stat().st_blocks for file in files if file.is_file())


def measure(preset: str, steps: int, folder: Path) -> list[tuple[int, Sizes, Sizes]]:
    """(step, memory, files) of a run, about once a second."""
    keys = (f"steps={steps}", f"runs_dir={folder}", "name=long", "eval.every=0", "eval.prompts=8")
    run = subprocess.Popen(
        [
            *(sys.executable, "-m", "deploy.cli", "train", "--config"),
            *(str(CONFIGS / f"{preset}.yaml"), *keys, *PRESETS[preset], "checkpoint.every=500"),
        ],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
    )
    root, metrics = psutil.Process(run.pid), folder / "long" / "metrics.jsonl"
    samples = []
    while run.poll() is None:
        records = read_metrics(metrics) if metrics.is_file() else []
        if records:
            samples.append((int(records[-1]["step"]), resident(root), written(folder / "long")))
        time.sleep(1.0)
    if run.returncode:
        raise SystemExit(f"the run of {preset} ended with status {run.returncode}")
    return samples


def memory_rows(preset: str, steps: int, samples: list[tuple[int, Sizes, Sizes]]) -> list[Row]:
    """A row for each kind of process."""
    begin = steps // 10
    early = [memory for step, memory, _ in samples if begin <= step < begin + WINDOW]
    # Behind the last step comes an evaluation.
    late = [memory for step, memory, _ in samples if steps - WINDOW <= step < steps]
    rows = []
    for kind in sorted(early[0]):
        before, after = (max(sample.get(kind, 0.0) for sample in them) for them in (early, late))
        rows.append(
            Row(
                f"resident memory of {kind} after {steps} steps of {preset}",
                f"after step {begin}",
                [after / before],
                1.05,
                False,
                f"{before:.0f} to {after:.0f} MiB",
                "" if after else "it is gone, or its name is another",
            )
        )
    return rows


def file_rows(preset: str, steps: int, samples: list[tuple[int, Sizes, Sizes]]) -> list[Row]:
    """A row for each file that grows with the steps."""
    at = {step: files for step, _, files in samples}  # the newest sample of a step
    begin, middle, end = (_nearest(at, to) for to in (steps // 10, steps // 2, steps))
    rows = []
    for name in FILES:
        first = (at[middle][name] - at[begin][name]) / (middle - begin)
        second = (at[end][name] - at[middle][name]) / (end - middle)
        rows.append(
            Row(
                f"a step of {preset} adds to {name}",
                "the steps before",
                [second / first if first else 1.0],
                1.1,
                False,
                f"{first:.2f} and {second:.2f} KiB a step, {at[end][name] / 1024:.1f} MiB in all",
            )
        )
    return rows


def _nearest(steps: Iterable[int], to: int) -> int:
    return min(steps, key=lambda step: abs(step - to))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--preset", nargs="+", default=list(PRESETS))
    options = parser.parse_args()
    rows = []
    for preset in options.preset:
        with tempfile.TemporaryDirectory() as name:
            samples = measure(preset, options.steps, Path(name))
        rows += memory_rows(preset, options.steps, samples)
        rows += file_rows(preset, options.steps, samples)
    emit(rows)


if __name__ == "__main__":
    main()
