"""How the coordinator's cost grows: scripted generators and verifiers, everything else real.

    python tests/bench/scaling.py

No model: a scripted generator answers at once with completions of the wanted length. What is left
is what the control plane and the data plane cost a learner step of 64 groups, with an update of
(no) weights, a canary and a heartbeat to every generator: wall seconds, seconds of the
coordinator's processor, and its memory. Each point is measured in a process and a cluster of its
own. Writes scaling.md, .json and .png.
"""

from __future__ import annotations

import asyncio
import json
import math
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
import psutil
import pyarrow as pa
import ray
from harness import RESULTS, machine

mpl.use("Agg")
import matplotlib.pyplot as plt

from actors.data.prompts import Prompt
from actors.generation.engine import Completion
from actors.generation.rows import rollout_batch
from actors.generation.under_way import WHOLE
from actors.rollout.episodes import Episodes, GroupSampling
from actors.rollout.group_book import GroupBook
from actors.rollout.guidance import Guidance
from actors.rollout.loop import RolloutLoop
from actors.rollout.pools import GeneratorPool, VerifierPool
from actors.verifiers.base import Verdict
from actors.verifiers.judge import judgement
from actors.verifiers.worker import with_verdicts
from common.config.algorithm import GuidanceConfig
from common.record.ledger import Ledger
from common.record.writer import TrajectoryLogClient, TrajectoryLogWriter
from common.supervision.calls import Handle, start_actor
from common.supervision.garbage import old_objects_settled
from common.supervision.waits import Waits
from common.trajectory import GroupRequest

if TYPE_CHECKING:
    from common.weights.transport import StoredBucket

STEPS, SKIPPED, PROMPTS = 14, 4, 64
"""With a staleness of 1, 128 groups under way: two for each of 64 generators."""
HOSTS = 2
"""Processes behind the scripted generators: 64 of them would not fit a small machine."""
DEADLINE_S = 300.0


class ScriptedGenerator:
    """A group of `length` tokens a completion, at once."""

    def __init__(self, length: int) -> None:
        self._completion = Completion([5] * length, [-0.5] * length, [0] * length, "stop")

    async def generate_group(self, request: GroupRequest) -> tuple[pa.RecordBatch, int]:
        count = request.num_completions
        sampled = dict.fromkeys(range(count), self._completion)
        return rollout_batch(request, sampled, [""] * count, "scripted"), WHOLE

    async def update_weights(self, buckets: list[StoredBucket], version: int) -> float:
        return 0.0

    async def score(self, sequences: list[list[int]], lengths: list[int]) -> list[list[float]]:
        return [[0.0] * len(sequence) for sequence in sequences]

    async def ping(self) -> None:
        """As a heartbeat asks."""


class ScriptedVerifier:
    """Rewards 0 and 1 in turns."""

    async def score_group(self, batch: pa.RecordBatch) -> tuple[pa.RecordBatch, int]:
        verdicts = [Verdict.scored(float(i % 2), "scripted") for i in range(batch.num_rows)]
        judged = [judgement([verdict], [1.0]) for verdict in verdicts]
        return with_verdicts(batch, ["rule"], judged), batch.num_rows


class Prompts:
    """One prompt, for ever."""

    def __init__(self) -> None:
        self.ticket = -1

    def next(self) -> Prompt:
        self.ticket += 1
        return Prompt(self.ticket, "p", 0, 0, "?", "?", [1] * 32, "{}", None, None)

    def encode(self, solution: str) -> list[int]:
        return []


@dataclass(frozen=True)
class Point:
    group_size: int
    tokens: int
    generators: int
    step_s: float
    coordinator_s: float
    coordinator_mib: float


async def measure(group_size: int, folder: Path, generators: int, tokens: int) -> Point:
    many = {"num_cpus": 0, "max_concurrency": 1000}
    hosts: list[Handle[Any]] = [start_actor(ScriptedGenerator, many, tokens) for _ in range(HOSTS)]
    verifier: Handle[Any] = start_actor(ScriptedVerifier, many)
    writer = start_actor(TrajectoryLogWriter, {"num_cpus": 0}, str(folder), ["rule"])
    waits = Waits()
    ledger = Ledger(folder / "ledger.sqlite", "one prompt")
    handles = {f"generator-{i}": hosts[i % HOSTS] for i in range(generators)}
    pool = GeneratorPool(handles, waits, 0)
    book = GroupBook(ledger, waits, max_staleness=1, groups_per_step=PROMPTS)
    loop = RolloutLoop(
        source=Prompts(),  # type: ignore[arg-type]
        episodes=Episodes(
            pool,
            VerifierPool({"verifier-0": verifier}, waits),
            sample_timeout_s=DEADLINE_S,
            judge_timeout_s=DEADLINE_S,
        ),
        book=book,
        log=TrajectoryLogClient(writer, waits, 60.0),
        guidance=Guidance(GuidanceConfig(), 1, 1),
        sampling=GroupSampling(group_size, tokens, 1.0),
        seed=None,
    )
    running = asyncio.create_task(loop.run())
    walls, cpus, process = [], [], psutil.Process()
    for step in range(STEPS):
        wall, cpu = time.perf_counter(), time.process_time()
        book.trained(step + 1, await book.take(step, DEADLINE_S))
        await pool.update_weights([], step + 1, DEADLINE_S)
        await pool.score([[1] * 32] * 8, [16] * 8, DEADLINE_S)
        await pool.ping(DEADLINE_S)
        pool.now_hold(step + 1)
        await book.release()
        if step >= SKIPPED:
            walls.append(time.perf_counter() - wall)
            cpus.append(time.process_time() - cpu)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    ledger.end()
    for actor in (*hosts, verifier, writer):
        actor.kill()
    return Point(
        group_size,
        tokens,
        generators,
        float(np.median(walls)),
        float(np.median(cpus)),
        process.memory_info().rss / 2**20,
    )


def measure_here(group_size: int, tokens: int, generators: int) -> Point:
    """In this process, which has done nothing else: its memory is this point's."""
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        with tempfile.TemporaryDirectory() as folder, old_objects_settled():
            return asyncio.run(measure(group_size, Path(folder), generators, tokens))
    finally:
        ray.shutdown()


def sweep() -> dict[str, list[Point]]:
    """One quantity at a time, from 8 completions of 256 tokens on 4 generators."""
    base = {"group_size": 8, "tokens": 256, "generators": 4}
    ranges = {
        "group_size": (2, 4, 8, 16, 32, 64),
        "tokens": (64, 256, 1024, 4096, 16_384),
        "generators": (1, 4, 16, 64),
    }
    points: dict[str, list[Point]] = {}
    for name, values in ranges.items():
        for value in values:
            command = [sys.executable, __file__, json.dumps(base | {name: value})]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            point = Point(**json.loads(done.stdout.splitlines()[-1]))
            points.setdefault(name, []).append(point)
            print(name, point, flush=True)
    return points


def plot(points: dict[str, list[Point]], path: Path) -> None:
    figure, axes = plt.subplots(
        2, 3, figsize=(11, 5), layout="constrained", sharex="col", sharey="row"
    )
    for index, (name, series) in enumerate(points.items()):
        time_axis, memory_axis = axes[:, index]
        x = [getattr(point, name) for point in series]
        for field, style, color, label in (
            ("step_s", "o-", "#0f766e", "step, wall"),
            ("coordinator_s", "s--", "#c2410c", "coordinator's processor"),
        ):
            y = [1e3 * getattr(point, field) for point in series]
            time_axis.plot(x, y, style, color=color, label=label)
        memory_axis.plot(x, [p.coordinator_mib for p in series], "D-", color="#4338ca")
        time_axis.set_xscale("log", base=2)
        time_axis.set_yscale("log")
        memory_axis.set_ylim(bottom=0)
        memory_axis.set_xlabel(name.replace("_", " "))
        for axis in (time_axis, memory_axis):
            axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("milliseconds a step")
    axes[1, 0].set_ylabel("coordinator, MiB")
    axes[0, 0].legend(frameon=False, fontsize=8)
    figure.suptitle(f"Cost of a step of {PROMPTS} groups without a model", fontsize=10)
    figure.savefig(path, dpi=110)


def exponent(name: str, series: list[Point], value: str) -> float:
    """Slope in logarithms from the middle of the range to its end."""
    first, last = series[len(series) // 2], series[-1]
    rise = math.log(getattr(last, value) / getattr(first, value))
    return rise / math.log(getattr(last, name) / getattr(first, name))


def main() -> None:
    points = sweep()
    RESULTS.mkdir(exist_ok=True)
    lines = [
        f"{json.dumps(machine())}\n",
        f"A learner step of {PROMPTS} groups, median of {STEPS - SKIPPED}.\n",
        "| group size | tokens a completion | generators | step, ms | coordinator, ms "
        "| coordinator, ms a group | coordinator, MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for series in points.values():
        lines += [
            f"| {p.group_size} | {p.tokens} | {p.generators} | {1e3 * p.step_s:.0f} "
            f"| {1e3 * p.coordinator_s:.0f} | {1e3 * p.coordinator_s / PROMPTS:.1f} "
            f"| {p.coordinator_mib:.0f} |"
            for p in series
        ]
    lines.append("")
    for name, series in points.items():
        step, coordinator, memory = (
            exponent(name, series, value)
            for value in ("step_s", "coordinator_s", "coordinator_mib")
        )
        lines.append(
            f"- {name}: a step grows as its power {step:.2f}, the coordinator's time as "
            f"{coordinator:.2f}, its memory as {memory:.2f} (upper half)"
        )
    (RESULTS / "scaling.md").write_text("\n".join(lines) + "\n")
    (RESULTS / "scaling.json").write_text(
        json.dumps({k: [asdict(p) for p in v] for k, v in points.items()}, indent=0) + "\n"
    )
    plot(points, RESULTS / "scaling.png")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(asdict(measure_here(**json.loads(sys.argv[1])))))
    else:
        main()
