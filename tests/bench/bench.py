"""Every figure of the project's speed as a ratio: `make bench`, `make bench-long`.

    python tests/bench/bench.py [--long] [--only NAME ... [--keep]] [--save-baseline]

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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness import RESULTS, ROOT, Row, load_baseline, machine, save_baseline, table

HERE = Path(__file__).parent
SHORT = (
    *("maths", "learner_memory", "learner", "adapters", "log", "sandbox"),
    *("start", "generator", "quantized", "episodes", "overlap", "peer", "peer_episodes"),
)
LONG = ("memory", "peer_accuracy:tiny", "peer_accuracy:smollm2")
"""Scripts of rows; behind the colon an argument."""
DEADLINE_S = {"peer": 1200, "peer_episodes": 1200, "memory": 7200, "peer_accuracy": 7200}


def run(name: str) -> list[Row]:
    """The rows of one script; a failed script is one failed row."""
    print(f"... {name}", flush=True)
    script, _, argument = name.partition(":")
    deadline_s = DEADLINE_S.get(script, 600)
    failure = f"the script gave nothing within {deadline_s} s"
    process = subprocess.Popen(
        [sys.executable, str(HERE / f"rows_{script}.py"), *filter(None, [argument])],
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
    return os.pathsep.join([str(ROOT / "tests" / "support"), *([inherited] if inherited else [])])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--long", action="store_true")
    parser.add_argument("--only", nargs="+", default=[])
    parser.add_argument("--keep", action="store_true", help="rows of --only go into the results")
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
    seconds = time.monotonic() - started
    print(f"\n{table(rows, baseline)}\n\n{summary(rows, baseline, seconds)}")
    if not options.only or options.keep:
        keep(name, here, rows, seconds, instead_of=options.only)
    if options.save_baseline:  # behind `keep`, which shows the rows against the baseline before
        save_baseline(name, rows)
    good = all(r.meets_target() and not r.regressed(baseline.get(r.name)) for r in rows)
    return 0 if good else 1


def summary(rows: list[Row], baseline: dict[str, float], seconds: float) -> str:
    """The last line."""
    regressed = [row.name for row in rows if row.regressed(baseline.get(row.name))]
    holding = sum(row.meets_target() and row.name not in regressed for row in rows)
    last = f"{holding} of {len(rows)} rows hold, after {seconds / 60:.0f} minutes"
    return last + (f"; fallen behind their baseline: {', '.join(regressed)}" if regressed else "")


def keep(
    name: str, here: dict[str, Any], rows: list[Row], seconds: float, instead_of: Sequence[str]
) -> None:
    """Write the results; with `instead_of`, only those of these scripts are replaced."""
    RESULTS.mkdir(exist_ok=True)
    path, others = RESULTS / f"bench-{name}.json", list[Row]()
    if instead_of and path.is_file():
        old = json.loads(path.read_text())
        names = {row.name for row in rows} | set(instead_of)  # a script that failed is a row too
        others = [row for row in (Row(**each) for each in old["rows"]) if row.name not in names]
        # Rows measured again took the place of as much time.
        seconds = old["seconds"] + (seconds if len(others) == len(old["rows"]) else 0.0)
    rows = others + rows
    content = {"machine": here, "seconds": round(seconds), "rows": [vars(row) for row in rows]}
    path.write_text(json.dumps(content, indent=1) + "\n")
    baseline = load_baseline(name)
    text = f"{table(rows, baseline)}\n\n{summary(rows, baseline, seconds)}"
    path.with_suffix(".md").write_text(f"{json.dumps(here)}\n\n{text}\n")


if __name__ == "__main__":
    sys.exit(main())
