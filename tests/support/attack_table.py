"""The table of attacks in actors/README.md: `python tests/support/attack_table.py` writes it.

A test holds that it is up to date.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "actors" / "README.md"
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

from attacks import ATTACKS  # noqa: E402
from between_marks import with_part  # noqa: E402

_TESTS = {"stdin": "outputs", "call": "results", "sum": "results", "script": "a script"}


def table() -> str:
    lines = [
        "| a program that ... | is tested by | is then a | and counted as touching |",
        "|---|---|---|---|",
    ]
    for attack in ATTACKS:
        row = (
            attack.name,
            _TESTS[attack.tests],
            f"`{attack.verdict}`",
            attack.touched or "nothing",
        )
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines) + "\n"


def with_table(text: str) -> str:
    return with_part(text, "attacks", "attack_table.py", table())


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text()))
