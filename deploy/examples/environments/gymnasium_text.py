"""A game of gymnasium that can show itself as text, played in words.

    environment.name=deploy.examples.environments.gymnasium_text:Game data.path=games.jsonl

It needs `pip install gymnasium`. A row of the data is a prompt that says how to play, such as
`{"prompt": "Go from S to G, not into H. Say left, down, right or up.", "game": 1}`. Rows that are
the same are one task, so number them. Games with `render_mode="ansi"` will do: FrozenLake-v1,
Taxi-v4, CliffWalking-v1.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium

from actors.environments.base import Environment, Step

_COLOURED = re.compile(r"\x1b\[\d+m(.*?)\x1b\[0m")


class Game(Environment):
    """Moves by the last word of a reply that is an action."""

    def __init__(
        self,
        game: str = "FrozenLake-v1",
        actions: Sequence[str] = ("left", "down", "right", "up"),
        options: Mapping[str, Any] | None = None,
    ) -> None:
        """Take names of the actions in the game's order, and what `gymnasium.make` takes."""
        self._game = gymnasium.make(game, render_mode="ansi", **(options or {}))
        self._actions = list(actions)

    def reset(self, task: Mapping[str, Any], seed: int) -> str:
        self._game.reset(seed=seed)
        return self._shown()

    def step(self, reply: str) -> Step:
        before = self._shown()
        words = [word for word in re.findall(r"\w+", reply.lower()) if word in self._actions]
        if not words:
            return Step(f"Say one of {', '.join(self._actions)}.", reward=0.0, state=before)
        _, reward, over, cut, _ = self._game.step(self._actions.index(words[-1]))
        return Step(self._shown(), reward=float(reward), done=over or cut, state=before)

    def _shown(self) -> str:
        """The board; what the game would colour, where the player stands, is in brackets."""
        return _COLOURED.sub(r"[\1]", str(self._game.render())).strip()
