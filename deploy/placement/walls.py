"""The walls around verifiers on this host, for `plan` and for the first lines of a run."""

from __future__ import annotations

from actors.sandbox.programs import check_walls
from actors.sandbox.walls import find_walls
from common.config.sections import VerifierConfig

RUNS_PROGRAMS = "code_tests"


def walls_here(config: VerifierConfig) -> list[str]:
    """A line for each wall that stands here.

    Raises:
        UserError: a rule runs programs, and a program could reach its judge here.
    """
    walls = find_walls()
    runs_programs = any(rule.name == RUNS_PROGRAMS for rule in config.rules)
    if runs_programs and config.sandbox == "required":
        check_walls(walls)
    gaps = [f"not safe for programs of a model: {gap}" for gap in walls.gaps()]
    return [*walls.describe(), *gaps]
