"""Nodes of a Ray cluster on this machine, all of one kind each, and a run over them."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path
from typing import Any

from ray.cluster_utils import Cluster

from common.record.trajectory_log import read_log

MEMORY = 2**28
"""Object store of a node, bytes."""
POOLS = (
    *("generator.count=2", "generator.min_count=1", "generator.resources={generation: 1}"),
    *("learner.resources={learning: 1}", "verifier.labels={pool: verification}"),
)


def add(cluster: Cluster, pool: str, cpus: int) -> Any:
    """A node with one of the custom resource `pool`, and a label that says the same."""
    return cluster.add_node(
        num_cpus=cpus, resources={pool: 1}, object_store_memory=MEMORY, labels={"pool": pool}
    )


def wait_for_both(process: subprocess.Popen[str], run: Path, since: int) -> None:
    """Until two generators have sampled groups dispatched at version `since` or later."""
    deadline = time.monotonic() + 240
    while len(samplers(run, since)) < 2:
        assert process.poll() is None
        assert time.monotonic() < deadline, samplers(run, since)
        time.sleep(1.0)


def samplers(run: Path, since: int) -> set[str]:
    """Generators that sampled logged groups which were dispatched at version `since` or later."""
    return {
        batch.column("generator")[0].as_py()
        for batch in read_log(run / "trajectories")
        if batch.column("dispatch_version")[0].as_py() >= since
    }
