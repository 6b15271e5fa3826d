"""Nodes of a Ray cluster on this machine, all of one kind each."""

from __future__ import annotations

from typing import Any

from ray.cluster_utils import Cluster

MEMORY = 2**28
"""Object store of a node, bytes."""


def add(cluster: Cluster, pool: str, cpus: int) -> Any:
    """A node with one of the custom resource `pool`, and a label that says the same."""
    return cluster.add_node(
        num_cpus=cpus, resources={pool: 1}, object_store_memory=MEMORY, labels={"pool": pool}
    )
