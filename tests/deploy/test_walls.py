"""What a run says of the walls around its verifiers, and where it is refused."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from run_process import EPISODES, TINY

import actors.environments.worker
import actors.sandbox.sandbox
import actors.verifiers.worker
import deploy.placement.walls
from actors.environments.check import environment_tools
from actors.sandbox.walls import Walls, find_walls
from actors.verifiers.worker import VerifierWorker
from common.config.sections import EnvironmentConfig, VerifierConfig, VerifierSpec
from common.errors import UserError
from deploy.command.presets import load_with_origins
from deploy.placement.walls import environment_walls, walls_here, walls_planned, walls_there
from deploy.predict.plan import describe

BARE = Walls(calls=True, landlock=0)


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that offers no wall for files."""
    found: Callable[[], Walls] = lambda: BARE  # noqa: E731
    for module in (
        *(actors.verifiers.worker, actors.sandbox.sandbox, actors.environments.worker),
        deploy.placement.walls,
    ):
        monkeypatch.setattr(module, "find_walls", found)


def code(sandbox: str) -> VerifierConfig:
    return VerifierConfig(rules=[VerifierSpec(name="code_tests")], sandbox=sandbox)


@pytest.mark.usefixtures("bare")
def test_programs_are_refused_where_they_could_reach_their_judge() -> None:
    with pytest.raises(UserError, match=r"verifier\.sandbox=trusted"):
        walls_here(code("required"))
    with pytest.raises(UserError, match=r"verifier\.sandbox=trusted"):
        walls_planned(code("required"), "local")
    assert any("not safe" in line for line in walls_here(code("trusted")))
    rules = VerifierConfig(rules=[VerifierSpec(name="math_answer")])
    assert any("not safe" in line for line in walls_here(rules))


@pytest.mark.usefixtures("bare")
def test_so_they_are_by_a_verifier_on_its_own_node() -> None:
    def warmed(sandbox: str) -> list[str]:
        worker = VerifierWorker(code(sandbox))
        try:
            return asyncio.run(worker.warm_up())
        finally:
            worker.close()

    with pytest.raises(UserError, match=r"verifier\.sandbox=trusted"):
        warmed("required")
    assert warmed("trusted") == BARE.describe()


@pytest.mark.usefixtures("bare")
def test_environments_play_behind_any_walls_but_run_no_programs_where_some_are_missing() -> None:
    own = EnvironmentConfig(name="guess")
    assert environment_tools(own) == []
    said = environment_walls(own, "local")
    assert said[:3] == BARE.describe()
    assert "files of the user can be read" in said[3]
    with pytest.raises(UserError, match="programs that a model writes are not safe to run here"):
        environment_tools(EnvironmentConfig(name="python"))


def test_walls_of_environments_are_told_of_where_there_are_environments() -> None:
    assert environment_walls(EnvironmentConfig(), "local") == []
    own = EnvironmentConfig(name="guess")
    assert environment_walls(own, "local")[:3] == find_walls().describe()
    assert environment_walls(own, "auto")[0].startswith("each node's own")
    told = describe(load_with_origins(TINY, [*EPISODES]), None, None)
    assert "4 GiB an episode at most" in told
    assert told.count(f"  behind walls         {find_walls().describe()[0]}") == 2


@pytest.mark.usefixtures("bare")
def test_a_plan_for_a_cluster_does_not_judge_by_the_machine_it_is_made_on() -> None:
    lines = walls_planned(code("required"), "10.0.0.1:6379")
    assert "each node's own" in lines[0]
    assert "open to reading" in lines[0]


def test_verifiers_with_the_same_walls_share_a_line() -> None:
    best = find_walls().describe()
    found = {"verifier-0": best, "verifier-1": BARE.describe(), "verifier-2": best}
    lines = walls_there(found)
    assert len(lines) == 2
    assert lines[0].startswith("verifier-0, verifier-2 behind walls: identity: ")
    assert lines[1].endswith("calls: an allow-list (seccomp)")
