"""The reference of metrics in common/README.md: `python tests/support/metric_table.py` writes it.

A test holds that it is up to date.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "common" / "README.md"
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

from between_marks import with_part  # noqa: E402

from common.record.metric_names import METRICS, SUMMARY  # noqa: E402


def table() -> str:
    lines = ["| metric | unit | meaning | written by |", "|---|---|---|---|"]
    for name, metric in {**METRICS, **SUMMARY}.items():
        link = f"[{Path(metric.writer).stem}](../{metric.writer})"
        lines.append(f"| `{name}` | {metric.unit} | {metric.meaning} | {link} |")
    return "\n".join(lines) + "\n"


def with_table(text: str) -> str:
    return with_part(text, "metrics", "metric_table.py", table())


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text()))
