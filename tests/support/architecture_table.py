"""The table of architectures in tests/README.md: `python tests/support/architecture_table.py`.

It shows tests/models/measured.json, which `make test-models` writes where MEASURED names it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "tests" / "README.md"
MEASURED = ROOT / "tests" / "models" / "measured.json"
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

from architectures import ARCHITECTURES  # noqa: E402
from between_marks import with_part  # noqa: E402

_LEARNER = ("learner, T 1", "learner, T 0.7")
_ENGINE = ("loaded", "v0", "v1", "v2")


def table() -> str:
    measured = json.loads(MEASURED.read_text())
    lines = [
        "| architecture | learner − transformers | loaded, v0, v1, v2 | sampled | checkpoint |",
        "|---|---|---|---|---|",
    ]
    refused = []
    for name, case in ARCHITECTURES.items():
        found = measured.get(name, {})
        if reason := case.learner_refuses or case.engine_refuses:
            by = "the learner" if case.learner_refuses else "vLLM"
            refused.append(f"| {name} | {by} | its error has the words: {reason} |")
            continue
        cells = (
            _worst(found, _LEARNER),
            _worst(found, _ENGINE),
            _worst(found, ("sampled",)),
            _worst(found, ("checkpoint",)),
        )
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", "| refused | by | why |", "|---|---|---|", *refused]
    return "\n".join(lines) + "\n"


def _worst(found: dict[str, Any], columns: tuple[str, ...]) -> str:
    """The largest of some numbers; a mark where one is missing."""
    if any(column not in found for column in columns):
        return "not run"
    return f"{max(found[column] for column in columns):.0e}"


def with_table(text: str) -> str:
    return with_part(text, "architectures", "architecture_table.py", table())


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text()))
