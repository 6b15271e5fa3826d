"""A run whose environments are a pool of actors on two nodes of their own."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import pytest
from cluster_nodes import add
from ray.cluster_utils import Cluster
from run_process import (
    GUESS,
    QUICK,
    beside,
    check_whole,
    finish,
    last_step,
    start,
    wait_for_step,
)

from common.record.metrics import read_metrics
from common.record.trajectory_log import read_log

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]

KEYS = (
    *(*QUICK, "eval.prompts=0", "steps=100000", "restart.backoff_s=0.1"),
    *("environment.name=own_games:Patient", "environment.args={seconds: 1.0}"),
    *("environment.placement=actors", "environment.workers=2", "environment.num_cpus=1"),
    *("environment.labels={pool: playing}", "batch.prompts_per_step=2", "batch.group_size=8"),
    *("learner.labels={pool: rest}", "generator.labels={pool: rest}"),
    "verifier.labels={pool: rest}",
)


def test_a_node_of_environments_goes_and_another_comes(cluster: Cluster, tmp_path: Path) -> None:
    """Episodes that were played there have no reward; the run goes on with the other node."""
    modules, run = tmp_path / "modules", tmp_path / "played"
    modules.mkdir()
    source = Path(__file__).parents[1] / "support/patient_environments.py"
    shutil.copy(source, modules / "own_games.py")
    add(cluster, "rest", 4)
    add(cluster, "playing", 1)
    second = add(cluster, "playing", 1)
    with beside(modules):
        process = start(
            *(f"ray.address={cluster.address}", f"runs_dir={tmp_path}", "name=played", *KEYS),
            stdout=(tmp_path / "output").open("w"),
            preset=GUESS,
        )
    wait_for_step(process, run, 2)
    cluster.remove_node(second, allow_graceful=False)
    wait_for_step(process, run, last_step(run) + 5)  # with one node, and no room for the other
    add(cluster, "playing", 1)
    wait_for_step(process, run, last_step(run) + 3)
    process.send_signal(signal.SIGTERM)
    finish(process, 120)
    output = (tmp_path / "output").read_text()
    assert process.returncode == 0, output
    assert "starts again" not in output, "neither a generator nor the run had to"
    check_whole(run, last_step(run))
    rows = [row for batch in read_log(run / "trajectories") for row in batch.to_pylist()]
    failed = [row for row in rows if row["environment_verdict"] == "error"]
    assert 0 < len(failed) < len(rows) / 2
    assert all("of the environments" in row["environment_reason"] for row in failed)
    assert {row["reward"] for row in failed} == {None}
    assert {row["environment_verdict"] for row in rows} <= {"pass", "fail", "error"}
    assert all(record["staleness/max"] <= 1 for record in read_metrics(run / "metrics.jsonl")[1:])
