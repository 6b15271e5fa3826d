"""Every figure of the project's speed as a ratio: `make bench`, `make bench-long`.

    python tests/bench/bench.py [--long] [--only NAME ...] [--save-baseline]

Each script of rows runs in a process of its own with a deadline. Exit status 1 when a row misses
its target or falls behind its committed baseline.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from harness import RESULTS, ROOT, Row, load_baseline, machine, save_baseline, table

HERE = Path(__file__).parent
SHORT = ("maths", "learner", "stream", "generator", "overlap", "peer")
LONG = ("memory", "peer_accuracy")
DEADLINE_S = {"peer": 1200, "memory": 3600, "peer_accuracy": 10_800}


def run(name: str) -> list[Row]:
    """The rows of one script; a failed script is one failed row."""
    print(f"... {name}", flush=True)
    deadline_s = DEADLINE_S.get(name, 600)
    failure = f"the script gave nothing within {deadline_s} s"
    process = subprocess.Popen(
        [sys.executable, str(HERE / f"rows_{name}.py")],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": _with_tests(os.environ.get("PYTHONPATH"))},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        output, errors = process.communicate(timeout=deadline_s)
    except subprocess.TimeoutExpired:
        return [Row(name, "", [], 0.0, True, failure=failure)]
    finally:
        _end(process)
    if process.returncode != 0:
        lines = [line for line in errors.splitlines() if line.strip()]
        return [Row(name, "", [], 0.0, True, failure=lines[-1] if lines else "no message")]
    return [Row(**row) for row in json.loads(output.splitlines()[-1])]


def _end(process: subprocess.Popen[str]) -> None:
    """What a script started and left would disturb the next rows."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _with_tests(inherited: str | None) -> str:
    """Rows use the made-up data of the tests."""
    return os.pathsep.join([str(ROOT / "tests"), *([inherited] if inherited else [])])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--long", action="store_true")
    parser.add_argument("--only", nargs="+", default=[])
    parser.add_argument("--save-baseline", action="store_true")
    options = parser.parse_args()
    kind = "long" if options.long else "short"
    names = options.only or (LONG if options.long else SHORT)
    started = time.monotonic()
    rows = [row for name in names for row in run(name)]
    here = machine()
    # Ratios differ between processors, vector products above all: a baseline for each kind.
    name = f"{here['instructions'].lower()}-{kind}"
    baseline = load_baseline(name)
    text = table(rows, baseline)
    holding = sum(row.meets_target() for row in rows)
    regressed = [row.name for row in rows if row.regressed(baseline.get(row.name))]
    minutes = (time.monotonic() - started) / 60
    last = f"{holding} of {len(rows)} rows hold, after {minutes:.0f} minutes"
    if regressed:
        last += f"; fallen behind their baseline: {', '.join(regressed)}"
    print(f"\n{text}\n\n{last}")
    if not options.only:
        RESULTS.mkdir(exist_ok=True)
        data = {"machine": here, "rows": [vars(row) for row in rows]}
        (RESULTS / f"bench-{name}.json").write_text(json.dumps(data, indent=1) + "\n")
        (RESULTS / f"bench-{name}.md").write_text(f"{json.dumps(here)}\n\n{text}\n\n{last}\n")
        if options.save_baseline:
            save_baseline(name, rows)
    return 0 if holding == len(rows) and not regressed else 1


if __name__ == "__main__":
    sys.exit(main())
