"""A Ray cluster of several nodes on this machine; custom resources stand for kinds of devices."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from cluster_nodes import MEMORY
from ray.cluster_utils import Cluster
from run_process import AGENTS, leftovers


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A head of one CPU with a dashboard; the test adds nodes. Ends with nothing left behind."""
    before = set(psutil.pids())
    # A job's `python` is the first on the path of the node, as in an image.
    path = (str(Path(sys.executable).parent), os.environ["PATH"])
    monkeypatch.setenv("PATH", os.pathsep.join(path))
    made = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 1,
            "include_dashboard": True,
            "dashboard_port": 0,
            "object_store_memory": MEMORY,
        },
    )
    try:
        yield made
    finally:
        made.shutdown()
        os.environ.pop("RAY_ADDRESS", None)
        assert leftovers(before, patience_s=60.0, ignored=AGENTS) == []
