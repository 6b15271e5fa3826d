"""Synchronous runs whose losses are on record, and the command that records them.

    python tests/support/golden_runs.py record [ROOT]

It runs the project at ROOT (this checkout, if none is given) and writes what this kind of processor
computes into `tests/integration/golden/`. Give it the ROOT of an earlier commit, checked out beside
this one, to record what the numbers were before a change.

The model is the tiny preset's before its warm start, whose result depends on the kind of processor.
Such a model answers no question, so its rewards are for the characters that it happens to write.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "integration" / "golden"
STEPS = 6
KEPT = ("loss/policy", "grad_norm", "reward/mean", "tokens/trained", "logprob_gap/mean")
COMMON = (
    f"steps={STEPS}",
    "generator.max_staleness=0",
    "eval.every=0",
    "eval.prompts=0",
    "checkpoint.every=0",
    "learner.credit_probe_every=0",
    # As it was when the numbers were recorded.
    "algorithm.credit.normalize=none",
    # Rare enough that some groups have no difference in reward, which DAPO replaces.
    "verifier.rules=[{name: format_rules, args: {patterns: ['[w-z]']}}]",
)
CASES = {
    "grpo_lambda_recent": ("recipe=grpo_lambda_recent",),
    "lambda_grpo": ("recipe=lambda_grpo",),
    "dapo": (
        "recipe=dapo",
        # As it was when the numbers were recorded.
        "algorithm.objective.updates_per_batch=1",
        "algorithm.rollout.mask_truncated=true",
        "algorithm.rollout.overlong_penalty_factor=1",
    ),
    "two_epochs_with_reference": (
        "recipe=grpo",
        "algorithm.objective.epochs=2",
        "algorithm.objective.kl=0.1",
    ),
}

Records = dict[str, list[dict[str, float]]]


def kind_of_processor() -> str:
    """What the last bits of a float depend on: kernels, processor and version of torch."""
    import torch

    first = Path("/proc/cpuinfo").read_text().partition("\n\n")[0]  # all cores are alike
    facts = dict(re.split(r"\s*:\s*", line, maxsplit=1) for line in first.splitlines())
    vendor = facts.get("vendor_id", platform.machine())
    family, model = facts.get("cpu family", "?"), facts.get("model", "?")
    kernels = torch.backends.cpu.get_cpu_capability()
    return f"{vendor}-{family}-{model}-{kernels}-torch-{torch.__version__}".replace(" ", "-")


def write_model(folder: Path) -> str:
    """Write the untrained tiny model; returns the digest of its weights."""
    from deploy.models.tiny_model import build_model, build_tokenizer

    tokenizer = build_tokenizer()
    build_model(tokenizer, seed=0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def run_cases(model: Path, runs: Path) -> None:
    """Run every case with the project of the current directory."""
    from deploy.launch import load, train_each

    keys = (*COMMON, f"model.path={model}", f"runs_dir={runs}")
    tiny = Path("deploy/configs/tiny.yaml")
    train_each([load(tiny, [*keys, *case, f"name={name}"]) for name, case in CASES.items()])


def records_of(root: Path, model: Path, runs: Path) -> Records:
    """What is kept of every step of every case, of the project at `root`.

    Raises:
        RuntimeError: a run failed; its output is in the message.
    """
    words = [sys.executable, str(Path(__file__)), "run", str(model), str(runs)]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(
        words, cwd=root, env=environment, capture_output=True, text=True, timeout=280, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(f"the runs at {root} failed:\n{done.stdout}\n{done.stderr}")
    found: Records = {}
    for name in CASES:
        lines = (runs / name / "metrics.jsonl").read_text().splitlines()
        steps = [record for record in map(json.loads, lines) if "grad_norm" in record]
        found[name] = [{key: record[key] for key in KEPT} for record in steps]
    return found


def record(root: Path) -> Path:
    """Write the record of this kind of processor from the project at `root`; returns the file."""
    words = ["git", "-C", str(root), "rev-parse", "HEAD"]
    commit = subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        digest = write_model(model)
        found = records_of(root, model, Path(folder))
    GOLDEN.mkdir(exist_ok=True)
    file = GOLDEN / f"{kind_of_processor()}.json"
    content = {"commit": commit, "model_sha256": digest, "records": found}
    file.write_text(json.dumps(content, indent=1) + "\n")
    return file


if __name__ == "__main__":
    if sys.argv[1] == "run":
        run_cases(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        print(record(Path(sys.argv[2]).resolve() if len(sys.argv) > 2 else ROOT))
