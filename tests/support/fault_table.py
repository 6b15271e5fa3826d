"""The table of faults in tests/README.md: `python tests/support/fault_table.py` writes it.

It is made from the names of the tests. Another test holds that it is up to date.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "tests" / "README.md"
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

from between_marks import with_part  # noqa: E402

from common.supervision.faults import POINTS  # noqa: E402

FAST = (
    "integration/test_replacement",
    "common/test_disks",
    "common/test_ledger",
    "common/test_lending",
    "common/test_trajectory_log",
    "learner/test_publish",
    "deploy/test_run_directory",
    "actors/test_sandbox",
    "actors/environments/test_hostile_environments",
    "common/test_waits",
)
SLOW = ("faults/test_points", "faults/test_deaths", "faults/test_kills", "faults/test_disk")


def tests_of(name: str) -> list[tuple[str, int]]:
    """(what a test says by its name, how many cases its parametrization lists)."""
    found = []
    tree = ast.parse((ROOT / "tests" / f"{name}.py").read_text())
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            found.append((node.name.removeprefix("test_").replace("_", " "), _cases(node)))
    return found


def _cases(node: ast.FunctionDef) -> int:
    count = 1
    for decorator in node.decorator_list:
        if isinstance(decorator, ast.Call) and ast.unparse(decorator.func).endswith("parametrize"):
            values = decorator.args[1]
            count *= len(values.elts) if isinstance(values, ast.List | ast.Tuple) else 1
    return count


def table() -> str:
    lines = ["| what is broken, and what then holds | cases | test | in |", "|---|---|---|---|"]
    for names, command in ((SLOW, "make faults"), (FAST, "make test")):
        for name in names:
            for words, cases in tests_of(name):
                lines.append(f"| {words} | {cases} | `{name}` | `{command}` |")
    lines += [
        "",
        "The named points at which a process is killed (`common/supervision/faults.py`):",
        "",
    ]
    lines += ["| point | what is true there |", "|---|---|"]
    lines += [f"| {point} | {meaning} |" for point, meaning in POINTS.items()]
    return "\n".join(lines) + "\n"


def with_table(text: str) -> str:
    """`text` with the table between its marks."""
    return with_part(text, "faults", "fault_table.py", table())


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text()))
