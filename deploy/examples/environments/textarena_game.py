"""A game for one player of textarena.

    environment.name=deploy.examples.environments.textarena_game:Game data.path=games.jsonl

It needs `pip install textarena`. A row is `{"prompt": "Play.", "game": 1}`: the game explains
itself in the first observation. Rows that are the same are one task, so number them. A move stands
in brackets, such as `[7]`. Offline run
GuessTheNumber-v0, Mastermind-v0, TowerOfHanoi-v0, Sudoku-v0, FrozenLake-v0 and others; Wordle and
TwentyQuestions fetch something from the net first.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

os.environ.setdefault("TEXTARENA_DISABLE_UPDATE_CHECK", "1")
import textarena

from actors.environments.base import Environment, Step


class Game(Environment):
    """Gives the game's own reward at its end, which is a number from -1 to 1."""

    def __init__(self, game: str = "GuessTheNumber-v0", options: Mapping[str, Any] | None = None):
        """Take the game's name, and what `textarena.make` takes besides."""
        self._game = textarena.make(env_id=game, **(options or {}))

    def reset(self, task: Mapping[str, Any], seed: int) -> str:
        self._game.reset(num_players=1, seed=seed)
        self._shown = ""
        return self._seen()

    def step(self, reply: str) -> Step:
        over, _ = self._game.step(action=reply)
        if not over:
            return Step(self._seen())
        return Step(reward=self._reward(), done=True)

    def reward(self, reply: str) -> float:
        """Nothing: the game was not over."""
        return 0.0

    def _seen(self) -> str:
        """What is new since the player looked last: the game shows all there was each time."""
        _, everything = self._game.get_observation()
        new = everything.removeprefix(self._shown)
        self._shown = everything
        return str(new).strip()

    def _reward(self) -> float:
        rewards, _ = self._game.close()
        return float(rewards[0])
