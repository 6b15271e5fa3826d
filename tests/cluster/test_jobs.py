"""A run as a Ray job: submitted uninstalled, stopped, submitted again, asked for its numbers."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import ray
from cluster_nodes import add
from ray.cluster_utils import Cluster
from run_process import QUICK, ROOT, check_whole, last_step

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]


class Jobs:
    """`ray job VERB` against a cluster's job server."""

    def __init__(self, cluster: Cluster) -> None:
        self.address = f"http://{cluster.webui_url}"

    def call(self, *words: str, timeout_s: float = 120.0) -> tuple[int, str]:
        done = subprocess.run(
            [str(Path(sys.executable).with_name("ray")), "job", *words],
            cwd=ROOT,
            env=environment(self.address),
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        return done.returncode, done.stdout + done.stderr

    def submit(self, job: str, *overrides: str, wait: bool) -> tuple[int, str]:
        options = ["--submission-id", job, "--working-dir", str(ROOT)]
        if not wait:
            options.append("--no-wait")
        train = ["python", "-m", "deploy.cli", "train", "--config", "deploy/configs/tiny.yaml"]
        return self.call("submit", *options, "--", *train, *overrides, timeout_s=600.0)


def environment(address: str) -> dict[str, str]:
    return os.environ | {"RAY_ADDRESS": address}


def test_a_job_is_stopped_with_a_checkpoint_and_goes_on_when_submitted_again(
    cluster: Cluster, tmp_path: Path
) -> None:
    add(cluster, "work", 4)
    jobs, run = Jobs(cluster), tmp_path / "job"
    keys = (
        *(*QUICK, f"runs_dir={tmp_path}", "name=job", "resume=auto", "ray.address=auto"),
        *("checkpoint.every=100", "checkpoint.stop_grace_s=50"),
    )
    status, output = jobs.submit("first", *keys, "steps=100000", wait=False)
    assert status == 0, output
    deadline = time.monotonic() + 300
    while last_step(run) < 4:
        failed = "FAILED" in jobs.call("status", "first")[1]
        assert not failed and time.monotonic() < deadline, jobs.call("logs", "first")[1]
        time.sleep(2.0)
    assert "grpo_lambda_reward_mean" in exported(cluster)
    status, output = jobs.call("stop", "first")
    assert status == 0, output
    stopped = last_step(run)
    assert (run / "checkpoints" / f"step-{stopped}").is_dir(), jobs.call("logs", "first")[1]
    status, output = jobs.submit("second", *keys, f"steps={stopped + 3}", wait=True)
    assert status == 0, output
    assert f"resuming from step {stopped}" in output
    check_whole(run, stopped + 3)
    status, output = jobs.submit("third", *keys, f"steps={stopped + 3}", wait=True)
    assert status == 0 and "is done" in output, output
    status, output = jobs.submit("wrong", *keys, "learner.rank=2", wait=True)
    assert status != 0 and "did you mean ranks" in output, output


def exported(cluster: Cluster) -> str:
    """What Prometheus would scrape from the nodes of the cluster, for up to a minute."""
    text, deadline = "", time.monotonic() + 60
    ray.init(address=cluster.address, logging_level="ERROR", log_to_driver=False)
    try:
        places = [
            (node["NodeManagerAddress"], node["MetricsExportPort"])
            for node in ray.nodes()
            if node["Alive"]
        ]
    finally:
        ray.shutdown()
    while "grpo_lambda_reward_mean" not in text and time.monotonic() < deadline:
        for host, port in places:
            with urllib.request.urlopen(f"http://{host}:{port}/metrics", timeout=10) as answer:
                text += answer.read().decode()
        time.sleep(2.0)
    return text
