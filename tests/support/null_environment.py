"""An environment that does nothing: what is measured with it is everything around it."""

from __future__ import annotations

from typing import Any

from actors.environments.base import Environment, Step


class Null(Environment):
    """Says one word a turn, until a limit ends the episode."""

    def step(self, reply: str) -> Any:
        return Step("On.")

    def reward(self, reply: str) -> float:
        return 0.0
