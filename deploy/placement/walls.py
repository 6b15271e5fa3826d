"""The walls around verifiers and environments, for `plan` and for the first lines of a run."""

from __future__ import annotations

from collections.abc import Mapping

from actors.sandbox.programs import check_walls
from actors.sandbox.walls import find_walls
from common.config.sections import EnvironmentConfig, VerifierConfig

RUNS_PROGRAMS = "code_tests"


def walls_here(config: VerifierConfig) -> list[str]:
    """A line for each wall that stands on this machine.

    Raises:
        UserError: a rule runs programs, and a program could reach its judge here.
    """
    walls = find_walls()
    runs_programs = any(rule.name == RUNS_PROGRAMS for rule in config.rules)
    if runs_programs and config.sandbox == "required":
        check_walls(walls)
    gaps = [f"not safe for programs of a model: {gap}" for gap in walls.gaps()]
    return [*walls.describe(), *gaps]


def walls_planned(config: VerifierConfig, address: str) -> list[str]:
    """What `plan` can say of the walls: on a cluster, nodes that it does not see decide.

    Raises: as `walls_here`, of a run on this machine.
    """
    if address == "local":
        return walls_here(config)
    return [
        _elsewhere(),
        "a node where a program could reach its judge ends a run of programs at its start, unless "
        "verifier.sandbox=trusted",
    ]


def environment_walls(config: EnvironmentConfig, address: str) -> list[str]:
    """Lines on what stands around episodes; none without an environment.

    An environment is code of the run's own, so it plays behind any walls. One that runs programs of
    the policy is refused by its worker where they could leave theirs (`actors.environments.child`).
    """
    if config.name is None:
        return []
    if address != "local":
        return [_elsewhere()]
    walls = find_walls()
    gaps = [f"not safe for an environment that cannot be trusted: {gap}" for gap in walls.gaps()]
    return [*walls.describe(), *gaps]


def _elsewhere() -> str:
    here = "; ".join(find_walls().describe())
    return f"each node's own, which the run's first lines name; on this machine {here}"


def walls_there(found: Mapping[str, list[str]]) -> list[str]:
    """Lines on the walls that verifiers have reported, once for those that have the same."""
    alike: dict[str, list[str]] = {}
    for name, lines in found.items():
        alike.setdefault("; ".join(lines), []).append(name)
    return [f"{', '.join(names)} behind walls: {lines}" for lines, names in alike.items()]
