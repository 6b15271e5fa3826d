"""A run over a head, a learner node, two generator nodes and a verifier node."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from cluster_nodes import POOLS, add, wait_for_both
from ray.cluster_utils import Cluster
from run_process import QUICK, check_whole, finish, last_step, start, wait_for_step

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]


def test_a_generator_node_goes_and_another_comes(cluster: Cluster, tmp_path: Path) -> None:
    add(cluster, "learning", 2)
    add(cluster, "verification", 1)
    add(cluster, "generation", 1)
    second = add(cluster, "generation", 1)
    run = tmp_path / "pools"
    process = start(
        *(f"ray.address={cluster.address}", f"runs_dir={tmp_path}", "name=pools", *QUICK, *POOLS),
        *("steps=100000", "restart.backoff_s=0.1"),
        stdout=(tmp_path / "output").open("w"),
    )
    wait_for_step(process, run, 3)
    wait_for_both(process, run, since=0)
    cluster.remove_node(second, allow_graceful=False)
    wait_for_step(process, run, last_step(run) + 6)  # fewer, and it goes on
    added_at = last_step(run)
    add(cluster, "generation", 1)
    wait_for_both(process, run, since=added_at + 2)
    process.send_signal(signal.SIGTERM)
    finish(process, 120)
    output = (tmp_path / "output").read_text()
    assert process.returncode == 0, output
    # Twice where the next one was put on the node that Ray did not miss yet.
    assert output.count("died and starts again") in (1, 2), output
    assert "all processes start again" not in output
    check_whole(run, last_step(run))


def test_a_cluster_without_room_is_an_error_that_says_what_is_missing(
    cluster: Cluster, tmp_path: Path
) -> None:
    add(cluster, "learning", 2)
    add(cluster, "generation", 1)
    process = start(
        *(f"ray.address={cluster.address}", f"runs_dir={tmp_path}", "name=small", *QUICK, *POOLS),
        *("generator.min_count=2", "ray.placement_timeout_s=5"),
    )
    output = finish(process, 120)
    assert process.returncode == 2, output
    assert "generation: 1 wanted, 0 free of 1" in output
    assert "no node has the label pool=verification" in output
