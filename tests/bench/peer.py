"""Runs of ours and of the peer on the same prompts, for the rows against TRL."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import CONFIGS, ROOT

from common.config.load import load_config
from common.config.sections import Config
from common.record.metrics import read_metrics
from common.record.trajectory_log import read_log
from deploy.placement.options import with_compute_dtype

HERE = Path(__file__).parent
# What both sides do: the same rule for rewards, and TRL's own method.
EQUAL = (
    *("recipe=grpo", "algorithm.rollout.overlong_penalty_share=0"),
    "verifier.rules=[{name: math_answer, args: {extract: last_number}}]",
)


def train(preset: str, folder: Path, *overrides: str) -> tuple[Config, list[dict[str, Any]]]:
    """A run of ours as a user starts it; its configuration and records."""
    path = CONFIGS / f"{preset}.yaml"
    keys = [f"runs_dir={folder}", "name=ours", *overrides]
    command = [sys.executable, "-m", "deploy.cli", "train", "--config", str(path), *keys]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    config = load_config([path], keys, CONFIGS / "recipes")
    return config, read_metrics(folder / "ours" / "metrics.jsonl")


def prompts_of(folder: Path) -> list[tuple[str, str]]:
    """(text, answer) of the run's groups, in the order they were dispatched."""
    groups = {
        b.column("group_id")[0].as_py(): b for b in read_log(folder / "ours" / "trajectories")
    }
    return [_question(groups[index].slice(0, 1).to_pylist()[0]) for index in sorted(groups)]


def held_out_of(folder: Path) -> list[tuple[str, str]]:
    """(text, answer) of the prompts it was evaluated on."""
    import pyarrow.parquet as pq

    path = sorted((folder / "ours" / "evaluations").glob("*.parquet"))[0]
    return [_question(row) for row in pq.read_table(path).to_pylist()]


def _question(row: dict[str, Any]) -> tuple[str, str]:
    return row["prompt_text"], str(json.loads(row["reference"])["answer"])


@dataclass(frozen=True)
class PeerResult:
    seconds: list[float]
    accuracy: list[tuple[float, float]]
    tokens: float
    """Mean of a completion, all steps together."""
    calls: float = 0.0
    """Calls of tools of an episode."""


def trl(
    model: str,
    config: Config,
    prompts: list[tuple[Any, str]],
    script: str = "peer_trl",
    **more: Any,
) -> PeerResult:
    """TRL with the settings that were its fastest on CPU: 8 at a time, 8 accumulated."""
    job = {
        "model": model,
        "prompts": prompts,
        "held_out": [],
        "steps": config.steps,
        "prompts_per_step": config.batch.prompts_per_step,
        "group_size": config.batch.group_size,
        "max_tokens": config.generator.max_completion_tokens,
        "learning_rate": config.learner.learning_rate,
        "warmup_steps": config.learner.warmup_steps,
        "microbatch": 8,
        "bf16": with_compute_dtype(config).model.dtype == "bfloat16",
        "eval_every": 0,
        "target": 1.0,
        "seed": config.seed,
    } | more
    python = os.environ.get("TRL_PYTHON", str(ROOT / ".venv-trl" / "bin" / "python"))
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "job.json").write_text(json.dumps(job))
        result = Path(name) / "result.json"
        subprocess.run(
            [python, str(HERE / f"{script}.py"), str(Path(name) / "job.json"), str(result)],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        return PeerResult(**json.loads(result.read_text()))
