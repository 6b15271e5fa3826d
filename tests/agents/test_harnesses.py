"""Runs whose episodes are played by programs that nobody here wrote, on real vLLM.

The OpenAI Agents SDK and `verifiers` are in environments of their own, made by `harness_setup.sh`.
"""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from run_process import PROGRAM, ROOT, check_whole, finish, run_python, start

from common.record.metrics import read_metrics
from common.record.segments import check_segments
from common.record.trajectory_log import read_log
from common.record.turns import check_turns

pytestmark = [pytest.mark.agents, pytest.mark.timeout(1200)]

SUPPORT = ROOT / "tests" / "support"
EXAMPLES = "deploy/examples/agents"
KEYS = (
    *("eval.every=0", "eval.prompts=16", "checkpoint.every=1", "learner.credit_probe_every=0"),
    *("steps=2", "generator.max_staleness=0", "batch.prompts_per_step=2", "batch.group_size=4"),
    *("data.template=chat", f"data.chat_template={SUPPORT / 'tiny_tools.jinja'}"),
    *("environment.turn_tokens=12", "environment.max_turns=4", "environment.episode_timeout_s=400"),
    *("generator.max_completion_tokens=200", "model.max_length=448", "generator.temperature=1.5"),
    *("verifier.rules=[{name: environment}]", "algorithm.rollout.overlong_penalty_share=0"),
    "generator.group_timeout_s=900",
)


def harness(name: str, *packages: str) -> str:
    """The Python of an environment with `packages`."""
    script = ROOT / "tests" / "agents" / "harness_setup.sh"
    subprocess.run(["bash", str(script), name, *packages], check=True, timeout=600)
    return str(ROOT / f".venv-{name}" / "bin" / "python")


def trained(folder: Path, *words: str) -> Path:
    """The folder of a run of two steps whose episodes are played by a command of these words."""
    command = f"environment.command=[{', '.join(words)}]"
    process = start(*KEYS, command, f"runs_dir={folder}", "name=run")
    output = finish(process, 1000)
    assert process.returncode == 0, output
    run = folder / "run"
    check_whole(run, 2)
    return run


def episodes(run: Path) -> list[dict[str, Any]]:
    """The rows of the log, whose turns and segments are what they should be."""
    batches: list[pa.RecordBatch] = list(read_log(run / "trajectories"))
    for batch in batches:
        check_turns(batch)
        check_segments(batch)
    return [row for batch in batches for row in batch.to_pylist()]


def replayed(run: Path, step: int) -> str:
    """What `replay` says of a step, which comes out bit for bit."""
    done = run_python(*PROGRAM, "replay", str(run), "--step", str(step), timeout_s=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "bitwise" in done.stdout, done.stdout
    return done.stdout


def test_an_agent_with_sub_agents_trains_and_is_replayed(tmp_path: Path) -> None:
    """Conversations of different prompts in one episode, and rewards that differ."""
    run = trained(tmp_path, "python", str(SUPPORT / "odd_agents.py"), "plays")
    rows = episodes(run)
    # A conversation that the group's prompt begins is none beside it.
    assert {len(row["segments"]) for row in rows} == {0, 2}
    assert all(row["reward"] is not None for row in rows)
    records = read_metrics(run / "metrics.jsonl")[1:]
    assert all(record["episode/segments"] > 1 for record in records)
    assert any(record["grad_norm"] > 0 for record in records)
    for step in (1, 2):
        replayed(run, step)


def test_an_agent_of_the_openai_agents_sdk_trains_and_is_replayed(tmp_path: Path) -> None:
    python = harness("agents", "openai-agents==0.24.0")
    run = trained(tmp_path, python, f"{EXAMPLES}/openai_agent.py")
    rows = episodes(run)
    assert {row["environment_verdict"] for row in rows} <= {"pass", "fail"}, {
        row["environment_reason"] for row in rows
    }
    assert all(row["segments"] for row in rows)  # the SDK's own prompt, with its tools
    replayed(run, 2)


def test_an_environment_of_verifiers_trains_and_is_replayed(tmp_path: Path) -> None:
    python = harness("verifiers", "verifiers==0.1.14")
    run = trained(tmp_path, python, f"{EXAMPLES}/with_verifiers.py")
    rows = episodes(run)
    assert {row["environment_verdict"] for row in rows} <= {"pass", "fail"}, {
        row["environment_reason"] for row in rows
    }
    replayed(run, 2)
