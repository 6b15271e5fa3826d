"""Runs as a person starts them: command lines, their ends, and what they leave behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from common.config.load import load_config
from common.record.metrics import read_metrics
from common.record.trajectory_log import read_log

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "deploy" / "configs" / "tiny.yaml"
GUESS = TINY.with_name("tiny-guess.yaml")
QUICK = ("eval.every=0", "eval.prompts=16", "checkpoint.every=2", "learner.credit_probe_every=0")
"""For runs that are broken on purpose: little beside their steps, and a checkpoint often."""


EPISODES = (
    "environment.name=guess",
    "environment.turn_tokens=6",
    "environment.max_turns=2",
    "generator.max_completion_tokens=80",
    "verifier.rules=[{name: environment}]",
    "data.template=chat",
    f"data.chat_template={Path(__file__).parent / 'tiny_chat.jinja'}",
    # Its questions are no guessing game, but their answers are numbers to be found.
    "algorithm.rollout.overlong_penalty_share=0",
)
"""Episodes of two turns for the tiny model."""


PROGRAM = ("-m", "deploy.cli")


def command(*overrides: str, program: Sequence[str] = PROGRAM, preset: Path = TINY) -> list[str]:
    return [sys.executable, *program, "train", "--config", str(preset), *overrides]


def run_python(*words: str, timeout_s: float) -> subprocess.CompletedProcess[str]:
    """To its end, in the project's folder; whatever status it ends with."""
    return subprocess.run(
        [sys.executable, *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def start(
    *overrides: str,
    stdout: Any = subprocess.PIPE,
    program: Sequence[str] = PROGRAM,
    preset: Path = TINY,
) -> subprocess.Popen[str]:
    """`stdout`: a pipe holds 64 KiB, which a long run fills; give it a file."""
    with heeding_interrupts():
        return subprocess.Popen(
            command(*overrides, program=program, preset=preset),
            cwd=ROOT,
            stdout=stdout,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )


@contextmanager
def heeding_interrupts() -> Iterator[None]:
    """Ctrl-C as at a terminal: what a shell starts in the background ignores it, and so would
    its children."""
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, inherited)


@contextmanager
def beside(folder: Path, **variables: str) -> Iterator[None]:
    """Modules of `folder` can be imported by what is started inside."""
    before = dict(os.environ)
    paths = [str(folder), *filter(None, [before.get("PYTHONPATH")])]
    os.environ |= {"PYTHONPATH": os.pathsep.join(paths), **variables}
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def finish(process: subprocess.Popen[str], timeout_s: float) -> str:
    try:
        output, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        pytest.fail(f"not done after {timeout_s:.0f} s:\n{output}")
    return output


AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
"""When their server is killed with the run, they try for a minute to report it there, then end."""


def leftovers(
    before: set[int], *, patience_s: float = 10.0, ignored: tuple[str, ...] = ()
) -> list[str]:
    """Processes that a run left: actors, engines, Ray itself, verifier children.

    Those of another tree's Python are not of this test, nor those below another test run or below
    what was there before.
    """
    deadline = time.monotonic() + patience_s
    marks = ("ray::", "raylet", "gcs_server", "EngineCore", "actors.sandbox")
    while True:
        found = []
        for process in psutil.process_iter(["pid", "cmdline", "name"]):
            line = " ".join(process.info["cmdline"] or [process.info["name"] or ""])
            if process.info["pid"] in before or any(name in line for name in ignored):
                continue
            if "/.venv/bin/python" in line.split(" ")[0] and sys.executable not in line:
                continue
            if any(mark in line for mark in marks) and not _of_others(process, before):
                found.append(f"{process.info['pid']} {line[:80]}")
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.5)


def _of_others(process: psutil.Process, before: set[int]) -> bool:
    """Whether it is below a living process that this test has nothing to do with."""
    ours = {os.getpid(), *(each.pid for each in psutil.Process().parents())}
    try:
        above = [each for each in process.parents() if each.pid not in ours]
        return any(each.pid in before or "pytest" in " ".join(each.cmdline()) for each in above)
    except psutil.NoSuchProcess:
        return False  # it ended just now; the next look will tell


def inspect(run: Path) -> tuple[int, str]:
    """Exit status and output of `inspect --ledger`."""
    done = run_python(*PROGRAM, "inspect", str(run), "--ledger", timeout_s=60)
    return done.returncode, done.stdout + done.stderr


def last_step(run: Path) -> int:
    """The newest step on record in a run directory; 0 without any."""
    metrics = run / "metrics.jsonl"
    return (
        int(max((r["step"] for r in read_metrics(metrics)), default=0)) if metrics.exists() else 0
    )


def wait_for_step(
    process: subprocess.Popen[str], run: Path, step: int, patience_s: float = 240
) -> None:
    deadline = time.monotonic() + patience_s
    while last_step(run) < step:
        assert process.poll() is None, finish(process, 10)
        if time.monotonic() > deadline:
            os.killpg(process.pid, signal.SIGKILL)
            pytest.fail(f"no step {step} in {patience_s:.0f} s:\n{finish(process, 10)}")
        time.sleep(0.02)


def check_whole(run: Path, steps: int) -> None:
    """All steps on record once, the bound held, the account closed, and no ticket skipped."""
    records = read_metrics(run / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(steps + 1))
    assert all(record["staleness/max"] <= 1 for record in records[1:])
    status, account = inspect(run)
    assert status == 0, account
    tickets = {batch.column("ticket")[0].as_py() for batch in read_log(run / "trajectories")}
    config = load_config([run / "config.yaml"], [], resolved=True)
    # What was under way at the end is in no log; a resumed run serves those turns again.
    under_way = (config.generator.max_staleness + 1) * config.groups_per_step
    missing = set(range(max(tickets) + 1)) - tickets
    assert all(ticket > max(tickets) - under_way for ticket in missing), (missing, max(tickets))


def process_of(run: subprocess.Popen[str], mark: str) -> psutil.Process | None:
    """A process below the run whose name has `mark` in it."""
    for process in psutil.Process(run.pid).children(recursive=True):
        try:
            if mark in " ".join(process.cmdline()[:1]):
                return process
        except psutil.NoSuchProcess:
            continue
    return None
