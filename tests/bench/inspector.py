"""How long the inspector takes to open a log of a million completions, and to answer.

    PYTHONPATH=.:tests/support python tests/bench/inspector.py [GROUPS]

Makes 125,000 groups of 8 completions of 16 tokens (0.7 GB, two minutes), or GROUPS of them, opens
them in a process of its own, as the verb would, and prints seconds; the second of each pair is of
the same request once more.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from inspector_runs import large_run

from deploy.inspector.query import GroupQuery
from deploy.inspector.run_data import RunData

GROUPS = 125_000


def measure(path: Path) -> None:
    """Print a line for opening `path` and for each kind of request."""
    started, computed = time.perf_counter(), time.process_time()
    data = RunData(path)
    opened, of_cpu = time.perf_counter() - started, time.process_time() - computed
    print(f"{'open':<28}{opened:8.2f} s, of a processor {of_cpu:.2f} s", flush=True)
    middle = data.state.groups.num_rows // 2
    requests: dict[str, Callable[[], Any]] = {
        "facts": data.facts,
        "first page": lambda: data.page(GroupQuery(descending=True)),
        "sorted by reward spread": lambda: data.page(GroupQuery(sort="spread", descending=True)),
        "sorted by question": lambda: data.page(GroupQuery(sort="question")),
        "filtered by reward": lambda: data.page(GroupQuery(reward_min=0.4, reward_max=0.6)),
        "text in any completion": lambda: whole(data, "777"),
        "a group in the middle": lambda: data.group(middle),
        "nothing changed": data.refresh,
    }
    for name, request in requests.items():
        times = []
        for _ in range(2):
            started = time.perf_counter()
            request()
            times.append(time.perf_counter() - started)
        print(f"{name:<28}{times[0]:8.2f} s, {times[1]:.3f} s", flush=True)


def whole(data: RunData, text: str) -> None:
    """Ask until the whole log is searched."""
    while data.page(GroupQuery(text=text))["searched"] < 1:
        pass


def main() -> None:
    if len(sys.argv) == 3:
        measure(Path(sys.argv[2]))
        return
    groups = int(sys.argv[1]) if len(sys.argv) > 1 else GROUPS
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "large"
        large_run(path, groups)
        print(f"{groups:,} groups of 8", flush=True)
        subprocess.run([sys.executable, __file__, "--open", str(path)], check=True)


if __name__ == "__main__":
    main()
