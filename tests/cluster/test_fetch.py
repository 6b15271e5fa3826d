"""Batches reach the learner's node before the step that trains on them asks."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest
import ray
from cluster_nodes import add
from learner_models import save_tiny_model, trajectories
from learner_ranks import make_worker
from made_up_groups import receipt
from ray.cluster_utils import Cluster
from ray.experimental import get_object_locations

from common.supervision.calls import start_actor
from common.supervision.waits import Waits
from learner.training.rank import LearnerRank
from learner.training.ranks import LearnerRanks

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]


def test_a_group_is_fetched_while_the_learner_is_busy(cluster: Cluster, tmp_path: Path) -> None:
    add(cluster, "learning", cpus=1)
    tests = Path(__file__).resolve().parents[1]
    path = f"{tests.parent}:{tests / 'support'}"
    environment = {"env_vars": {"PYTHONPATH": path}}
    ray.init(address=cluster.address, log_to_driver=False, runtime_env=environment)
    job = make_worker(save_tiny_model(tmp_path))._job
    learner = start_actor(LearnerRank, {"num_cpus": 1, "resources": {"learning": 1}}, job, 0)
    busy = learner.actor.__ray_call__.remote(lambda _: time.sleep(60.0))
    group = LearnerRanks([learner], Waits(), 60.0)
    refs = [ray.put(batch) for batch in trajectories([(512, [8192] * 8)] * 8)]
    try:
        for index, ref in enumerate(refs):
            group.fetch_ahead(replace(receipt(index, 0, 0), batch_ref=ref))
        deadline = time.monotonic() + 40
        while any(len(found["node_ids"]) < 2 for found in get_object_locations(refs).values()):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert ray.wait([busy], timeout=0) == ([], [busy])
    finally:
        learner.kill()
        ray.shutdown()
