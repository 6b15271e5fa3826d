"""A long run whose processes are killed or stopped at random, again and again.

The first process, the coordinator, is among them. At the end the run finishes its work, and the
account must close.

    make soak ARGS='--minutes 20'

Prints the account and a table of what was killed; writes tests/bench/results/soak.md.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import tempfile
import time
from collections import Counter
from pathlib import Path

import psutil
from run_process import AGENTS, ROOT, finish, inspect, last_step, leftovers, process_of, start

VICTIMS = (
    "the driver",
    "ray::Generator",
    "ray::LearnerRank",
    "ray::VerifierWorker",
    "ray::TrajectoryLogWriter",
    "raylet/raylet",
)
LONGEST_S = 40.0
KEYS = (
    *("checkpoint.every=10", "checkpoint.keep_last=2", "eval.every=0", "eval.prompts=16"),
    *("restart.heartbeat_s=2", "restart.silence_s=15"),  # how a stopped process is seen
    *("generator.group_timeout_s=30", "weights.publish_timeout_s=30", "checkpoint.timeout_s=60"),
    *("restart.limit=1000000", "restart.backoff_s=0.01"),
)


class Soak:
    """One run in `folder`, kept alive and killed."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.run = folder / "soak"
        self.keys = (*KEYS, f"runs_dir={folder}", "steps=1000000")
        self.draw = random.Random(seed)
        self.killed: Counter[str] = Counter()
        self.log = (folder / "output.txt").open("w")
        self.process: subprocess.Popen[str] = self._start("name=soak")

    def _start(self, run: str) -> subprocess.Popen[str]:
        return start(run, *self.keys, stdout=self.log)

    def output(self) -> str:
        return Path(self.log.name).read_text()[-5000:]

    def wait_until_it_trains(self) -> None:
        """A step more than is on record, or than a resume leaves there."""
        reached, deadline = last_step(self.run), time.monotonic() + 300
        while (now := last_step(self.run)) <= reached:
            reached = min(reached, now)
            if self.process.poll() is not None:
                raise SystemExit(f"the run ended by itself:\n{self.output()}")
            if time.monotonic() > deadline:
                raise SystemExit(f"no step for 300 s:\n{inspect(self.run)[1]}")
            time.sleep(0.1)

    def strike(self) -> None:
        """Kill or stop one process at a moment of chance."""
        time.sleep(self.draw.uniform(0.0, LONGEST_S) ** 0.5)
        mark = self.draw.choice(VICTIMS)
        how = self.draw.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGSTOP])
        if mark == "the driver":
            os.kill(self.process.pid, signal.SIGKILL)
            self.process.communicate(timeout=60)
            self.killed["the driver, SIGKILL"] += 1
            self.process = self._start(f"resume={self.run}")
            return
        victim = process_of(self.process, mark)
        if victim is not None:
            os.kill(victim.pid, how)
            self.killed[f"{mark}, {how.name}"] += 1

    def end(self) -> str:
        self.process.send_signal(signal.SIGTERM)
        finish(self.process, 120)
        if self.process.returncode != 0:
            raise SystemExit(f"it did not end in order:\n{self.output()}")
        status, account = inspect(self.run)
        if status != 0:
            raise SystemExit(account)
        return account


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, required=True)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    before, shared = set(psutil.pids()), set(os.listdir("/dev/shm"))
    ends = time.monotonic() + 60 * options.minutes
    with tempfile.TemporaryDirectory() as name:
        soak = Soak(Path(name), options.seed)
        while time.monotonic() < ends:
            soak.wait_until_it_trains()
            soak.strike()
            print(time.strftime("%H:%M:%S"), last_step(soak.run), dict(soak.killed), flush=True)
        soak.wait_until_it_trains()
        account, steps = soak.end(), last_step(soak.run)
    lost = leftovers(before, patience_s=120, ignored=AGENTS)
    leaked = sorted(set(os.listdir("/dev/shm")) - shared)
    command = f"make soak ARGS='--minutes {options.minutes:g} --seed {options.seed}'"
    lines = [f"`{command}`", ""]
    lines += [f"- {what}: {count}" for what, count in sorted(soak.killed.items())]
    left = f"processes left: {lost or 'none'}; files left in /dev/shm: {leaked or 'none'}"
    lines += ["", f"{steps} steps on record; {left}"]
    lines += ["", "```", account.rstrip(), "```", ""]
    text = "\n".join(lines)
    print(text)
    (ROOT / "tests" / "bench" / "results" / "soak.md").write_text(text)
    raise SystemExit(1 if lost or leaked else 0)


if __name__ == "__main__":
    main()
