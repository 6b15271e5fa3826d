"""A run whose episodes are played in a pool of actors."""

from __future__ import annotations

from pathlib import Path

from common.record.metrics import read_metrics
from common.record.trajectory_log import read_log
from deploy.launch import train

ROOT = Path(__file__).resolve().parents[2]


def test_a_run_plays_its_episodes_in_actors(tmp_path: Path) -> None:
    """Two steps of the guessing game; no episode fails, and the account is that of any run."""
    result = train(
        ROOT / "deploy" / "configs" / "tiny-guess.yaml",
        steps=2,
        runs_dir=tmp_path,
        name="pool",
        **{
            "environment.placement": "actors",
            "environment.workers": 2,
            "environment.num_cpus": 0.5,
            "batch.prompts_per_step": 2,
            "batch.group_size": 4,
            "eval.every": 0,
            "eval.prompts": 8,
            "algorithm.objective.updates_per_batch": 2,
        },
    )
    assert [record["step"] for record in read_metrics(result.path / "metrics.jsonl")][-1] == 2
    rows = [row for batch in read_log(result.path / "trajectories") for row in batch.to_pylist()]
    assert {row["environment_verdict"] for row in rows} <= {"pass", "fail"}
    assert {row["environment_reward"] for row in rows} <= {0.0, 1.0}
    assert max(len(row["turns"]) for row in rows) > 1
