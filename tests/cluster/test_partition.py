"""A generator's node that is cut off: a network namespace whose cable is pulled."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from cluster_nodes import MEMORY, POOLS, wait_for_both
from run_process import (
    AGENTS,
    QUICK,
    check_whole,
    finish,
    last_step,
    leftovers,
    start,
    wait_for_step,
)

HEAD, AWAY = "10.77.0.1", "10.77.0.2"
PORT = 6390
SPACE, CABLE = "grpo-lambda-away", "grpol0"
pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        os.geteuid() != 0 or shutil.which("ip") is None,
        reason="network namespaces want root and iproute2",
    ),
]


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=20)


@pytest.fixture
def cable() -> Iterator[str]:
    """A namespace behind a pair of interfaces; the name of our end."""
    ip("netns", "add", SPACE)
    try:
        ip("link", "add", CABLE, "type", "veth", "peer", "name", "eth0", "netns", SPACE)
        ip("addr", "add", f"{HEAD}/24", "dev", CABLE)
        ip("link", "set", CABLE, "up")
        ip("-n", SPACE, "addr", "add", f"{AWAY}/24", "dev", "eth0")
        ip("-n", SPACE, "link", "set", "eth0", "up")
        ip("-n", SPACE, "link", "set", "lo", "up")
        yield CABLE
    finally:
        ip("netns", "delete", SPACE)


class Node:
    """`ray start --block` here or in the namespace; ends with its children."""

    def __init__(self, *words: str, away: bool = False) -> None:
        prefix = ["ip", "netns", "exec", SPACE] if away else []
        ray = str(Path(sys.executable).with_name("ray"))
        options = ["--object-store-memory", str(MEMORY), "--disable-usage-stats", "--block"]
        self._process = subprocess.Popen(
            [*prefix, ray, "start", *options, *words],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def end(self) -> None:
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(40)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(10)


@pytest.fixture
def nodes(cable: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Node]]:
    """A head with a learner, verifiers and a generator, and a generator's node far away."""
    before = set(psutil.pids())
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0123456789abcdef" * 4)
    head = ["--head", "--port", str(PORT), "--node-ip-address", HEAD, "--num-cpus", "5"]
    labels = ["--resources", '{"learning": 1, "generation": 1}', "--labels", "pool=verification"]
    made = [Node(*head, *labels, "--include-dashboard", "false"), away()]
    try:
        yield made
    finally:
        for node in reversed(made):
            node.end()
        assert leftovers(before, patience_s=60.0, ignored=AGENTS) == []


def away() -> Node:
    words = ("--address", f"{HEAD}:{PORT}", "--node-ip-address", AWAY, "--num-cpus", "1")
    return Node(*words, "--resources", '{"generation": 1}', away=True)


def test_a_node_that_is_cut_off_is_missed_by_nobody_and_joins_again(
    nodes: list[Node], cable: str, tmp_path: Path
) -> None:
    run = tmp_path / "cut"
    process = start(
        *(f"ray.address={HEAD}:{PORT}", f"runs_dir={tmp_path}", "name=cut", *QUICK, *POOLS),
        *("steps=100000", "restart.backoff_s=0.1"),
        stdout=(tmp_path / "output").open("w"),
    )
    wait_for_step(process, run, 3)
    wait_for_both(process, run, since=0)
    ip("link", "set", cable, "down")
    wait_for_step(process, run, last_step(run) + 10)  # with the generator that is left
    ip("link", "set", cable, "up")  # the node finds itself declared dead and ends
    nodes.append(away())
    wait_for_both(process, run, since=last_step(run) + 2)
    process.send_signal(signal.SIGTERM)
    finish(process, 120)
    output = (tmp_path / "output").read_text()
    assert process.returncode == 0, output
    assert "all processes start again" not in output, output
    check_whole(run, last_step(run))
