"""Typed calls: what mypy makes of them, and which thread of an actor answers."""

from __future__ import annotations

from pathlib import Path

import pytest
from mypy import api

ROOT = Path(__file__).resolve().parents[2]

ACTOR = """
from __future__ import annotations
from common.supervision.calls import Handle, ask, ask_pair, call, resolved, start_actor

class Base:
    async def begin(self) -> None: ...

class Actor(Base):
    def __init__(self, rank: int) -> None: ...
    def step(self, version: int, *, log: str = "") -> dict[str, float]: return {}
    async def score(self, sequences: list[list[int]]) -> list[float]: return []
    async def pair(self) -> tuple[str, int]: return "", 0

actor = start_actor(Actor, {}, 0)
base: Handle[Base] = actor
"""

REVEALED = {
    "ask(actor, Actor.step, 1, log='x')": "Ref[dict[str, float]]",
    "ask(actor, Actor.score, [[1]])": "Ref[list[float]]",
    "ask(actor, Base.begin)": "Ref[None]",
    "ask_pair(actor, Actor.pair)": "tuple[Ref[str], Ref[int]]",
    "call(Actor.score, [[1]]).to(actor)": "Ref[list[float]]",
    "resolved(ask(actor, Actor.step, 1))": "dict[str, float]",
}
REFUSED = [
    "ask(actor, Actor.step, '1')",
    "ask(actor, Actor.step)",
    "ask(actor, Actor.step, 1, seed=2)",
    "ask(actor, Actor.score, [1])",
    "ask(base, Actor.step, 1)",
    "ask(actor, Actor.step, ask(actor, Actor.step, 1))",
    "call(Actor.score, [[1]]).to(base)",
    "start_actor(Actor, {}, 'rank')",
    "ask(actor, 'step', 1)",
]


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory) -> dict[int, str]:
    """What mypy says of each line after `ACTOR`, from 0."""
    folder = tmp_path_factory.mktemp("typed")
    lines = [f"reveal_type({line})" for line in REVEALED] + REFUSED
    (folder / "calls_of_an_actor.py").write_text(ACTOR + "\n".join(lines) + "\n")
    said, _, _ = api.run(
        [
            f"--config-file={ROOT / 'pyproject.toml'}",
            f"--cache-dir={folder / 'cache'}",
            "--no-pretty",
            str(folder / "calls_of_an_actor.py"),
        ]
    )
    found: dict[int, str] = {}
    for line in said.splitlines():
        place, _, message = line.partition(": ")
        if place.rpartition(":")[2].isdigit():
            number = int(place.rpartition(":")[2]) - ACTOR.count("\n") - 1
            found[number] = found.get(number, "") + message
    return found


@pytest.mark.parametrize(("index", "type_"), enumerate(REVEALED.values()), ids=list(REVEALED))
def test_the_answer_has_the_methods_type(checked: dict[int, str], index: int, type_: str) -> None:
    revealed = checked[index].replace("common.supervision.calls.", "").replace("typing.", "")
    assert revealed == f'note: Revealed type is "{type_}"'


@pytest.mark.parametrize("index", range(len(REFUSED)), ids=REFUSED)
def test_wrong_arguments_are_refused(checked: dict[int, str], index: int) -> None:
    assert "error: " in checked[len(REVEALED) + index]
