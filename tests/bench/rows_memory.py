"""(long) Resident memory of every process over 500 tiny steps."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from harness import ROOT, Row, emit

from common.record.metrics import read_metrics

STEPS, EARLY = 500, 50
KINDS = (
    "LearnerRank",
    "Generator",
    "VerifierWorker",
    "TrajectoryLogWriter",
    "EngineCore",  # with CUDA
    "deploy.cli",
    "sandbox_child",  # of the verifiers: where rules run
    "raylet",
    "gcs_server",
)
AGENTS = "Ray's agents"
"""What is left of Ray's: its agents of a node, and workers that wait for an actor."""


def resident(root: psutil.Process) -> dict[str, float]:
    """MiB of the run's processes by kind, children of a kind summed."""
    sizes: dict[str, float] = {}
    for process in [root, *root.children(recursive=True)]:
        try:
            line = " ".join(process.cmdline())
            kind = next((kind for kind in KINDS if kind in line), AGENTS)
            sizes[kind] = sizes.get(kind, 0.0) + process.memory_info().rss / 2**20
        except psutil.NoSuchProcess:
            continue
    return sizes


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        keys = (f"steps={STEPS}", f"runs_dir={name}", "name=long", "eval.every=0", "eval.prompts=8")
        command = [sys.executable, "-m", "deploy.cli", "train", "--config"]
        run = subprocess.Popen(
            [*command, str(ROOT / "deploy/configs/tiny.yaml"), *keys, "checkpoint.every=0"],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
        )
        root, metrics = psutil.Process(run.pid), Path(name) / "long" / "metrics.jsonl"
        early: list[dict[str, float]] = []
        late: list[dict[str, float]] = []
        while run.poll() is None:
            records = read_metrics(metrics) if metrics.is_file() else []
            step = records[-1]["step"] if records else 0
            if EARLY <= step < EARLY + 25:
                early.append(resident(root))
            elif STEPS - 25 <= step < STEPS:  # behind the last step comes an evaluation
                late.append(resident(root))
            time.sleep(1.0)
    rows = []
    for kind in sorted(early[0]):
        before = max(sample.get(kind, 0.0) for sample in early)
        after = max(sample.get(kind, 0.0) for sample in late)
        gone = "" if after else "it is gone, or its name is another"
        rows.append(
            Row(
                f"resident memory of {kind} after {STEPS} tiny steps",
                f"after step {EARLY}",
                [after / before],
                1.05,
                False,
                f"{before:.0f} to {after:.0f} MiB",
                gone,
            )
        )
    emit(rows)


if __name__ == "__main__":
    main()
