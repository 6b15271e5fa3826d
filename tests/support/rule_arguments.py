"""The arguments of rules in learner/README.md: `python tests/support/rule_arguments.py`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

from between_marks import with_part  # noqa: E402

from common.config.bounds import bound_of  # noqa: E402
from learner.algorithm.advantages import BASELINES  # noqa: E402
from learner.algorithm.aggregation import AGGREGATIONS  # noqa: E402
from learner.algorithm.arguments import parameters  # noqa: E402
from learner.algorithm.corrections import CORRECTIONS  # noqa: E402
from learner.algorithm.credit import CREDITS  # noqa: E402
from learner.algorithm.objectives import OBJECTIVES  # noqa: E402
from learner.algorithm.selection import ROLLOUTS  # noqa: E402
from learner.algorithm.token_advantages import ADVANTAGES  # noqa: E402

AXES = (ROLLOUTS, BASELINES, ADVANTAGES, CREDITS, OBJECTIVES, CORRECTIONS, AGGREGATIONS)
PAGE = ROOT / "learner" / "README.md"


def table() -> str:
    lines = ["| rule | argument | default | bound |", "|---|---|---|---|"]
    for axis in AXES:
        for kind, rule in axis.rules.items():
            hints = get_type_hints(rule, include_extras=True)
            for name, each in parameters(rule).items():
                hint = hints[name]
                bound = str(bound_of(hint) or "")
                if get_origin(hint) is Literal:
                    bound = ", ".join(f"`{choice}`" for choice in get_args(hint))
                lines.append(f"| {axis.name} `{kind}` | `{name}` | `{each.default}` | {bound} |")
    return "\n".join(lines) + "\n"


def with_table(text: str) -> str:
    """`text` with the table between its marks."""
    return with_part(text, "arguments", "rule_arguments.py", table())


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text()))
