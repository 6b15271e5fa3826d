"""What a benchmark row is, how it is judged, and the machine it was measured on.

A row is a ratio to something measured beside it in the same process or run, several times; its
value is the median. It holds when it meets its target, and is no worse than its committed
baseline by more than a tenth beyond the noise of its own repeats.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
BASELINES = Path(__file__).parent / "baselines"
RESULTS = Path(__file__).parent / "results"
CONFIGS = ROOT / "deploy" / "configs"
_ALLOWED = 0.10


@dataclass(frozen=True)
class Row:
    """One line of the table. `ratios`: one a repeat."""

    name: str
    against: str
    ratios: list[float]
    target: float
    higher_is_better: bool
    detail: str = ""
    """The absolute figures behind the ratio."""
    failure: str = ""
    """Why there is no figure."""

    @property
    def value(self) -> float:
        return statistics.median(self.ratios) if self.ratios else float("nan")

    @property
    def noise(self) -> float:
        """Half the spread of the repeats, relative to the median."""
        if len(self.ratios) < 2:
            return 0.0
        return (max(self.ratios) - min(self.ratios)) / 2 / self.value

    def meets_target(self) -> bool:
        if self.failure:
            return False
        return self.value >= self.target if self.higher_is_better else self.value <= self.target

    def regressed(self, baseline: float | None) -> bool:
        """Worse than `baseline` by more than a tenth and the noise."""
        if baseline is None or self.failure:
            return False
        allowed = 1 + _ALLOWED + self.noise
        if self.higher_is_better:
            return self.value < baseline / allowed
        return self.value > baseline * allowed


def ratio_of_times(
    ours: Callable[[], Any], other: Callable[[], Any], repeats: int, clock: Callable[[], float]
) -> tuple[list[float], float, float]:
    """`ours` / `other`, in turns after one warm-up each; (ratios, median of each)."""
    mine: list[float] = []
    theirs: list[float] = []
    for index in range(repeats + 1):
        for work, times in ((ours, mine), (other, theirs)):
            started = clock()
            work()
            if index:
                times.append(clock() - started)
    pairs = [a / b for a, b in zip(mine, theirs, strict=True)]
    return pairs, statistics.median(mine), statistics.median(theirs)


def emit(rows: Sequence[Row]) -> None:
    """A row script's output: the last line of standard output is its rows as JSON."""
    print(json.dumps([asdict(row) for row in rows]), flush=True)


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    import torch

    model = "unknown"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "cpu": model,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory, 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "measured": time.strftime("%Y-%m-%d"),
    }


def peak_kib() -> int:
    """Of this process alone: `ru_maxrss` starts at the parent's."""
    (line,) = [x for x in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in x]
    return int(line.split()[1])


def load_baseline(name: str) -> dict[str, float]:
    """Committed values by row, one file a kind of processor; absent rows have none."""
    path = BASELINES / f"{name}.json"
    values: dict[str, float] = json.loads(path.read_text())["values"] if path.is_file() else {}
    return values


def save_baseline(name: str, rows: Sequence[Row]) -> None:
    BASELINES.mkdir(exist_ok=True)
    values = load_baseline(name) | {r.name: round(r.value, 4) for r in rows if not r.failure}
    content = {"machine": machine(), "values": values}
    (BASELINES / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")


def table(rows: Sequence[Row], baseline: dict[str, float]) -> str:
    """Markdown."""
    lines = ["| row | against | target | measured | baseline | |", "|---|---|---|---|---|---|"]
    for row in rows:
        before = baseline.get(row.name)
        sign = "≥" if row.higher_is_better else "≤"
        verdict = "holds" if row.meets_target() else "misses"
        if row.regressed(before):
            verdict = "REGRESSED"
        measured = row.failure or f"{row.value:.3g} (± {100 * row.noise:.0f} %); {row.detail}"
        lines.append(
            f"| {row.name} | {row.against} | {sign} {row.target:g} | {measured} "
            f"| {'' if before is None else f'{before:.3g}'} | {verdict} |"
        )
    return "\n".join(lines)
