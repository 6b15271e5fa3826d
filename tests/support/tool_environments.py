"""Environments with tools that behave. Imported by the worker process."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from actors.environments.tools import ToolEnvironment

PRICES = {"tea": 3, "cake": 5}


class Shop(ToolEnvironment):
    """Sells tea and cake."""

    currency = "shillings"

    def reset(self, task: Mapping[str, Any], seed: int) -> str:
        super().reset(task, seed)
        return "Welcome."

    def price(self, thing: str, count: int = 1) -> int:
        """Say what a thing costs.

        Args:
            thing: Its name.
            count: How many.
        """
        return PRICES[thing] * count

    def buy(self, things: list[str]) -> str:
        """Buy things.

        Args:
            things: Their names.
        """
        return f"bought {', '.join(things)}"

    async def wait(self) -> dict[str, float]:
        """Wait in line."""
        await asyncio.sleep(0.01)
        return {"waited": 0.01}

    def break_down(self) -> str:
        """Press the red button."""
        raise ConnectionError("the till is offline")

    def reward(self, reply: str) -> float:
        return float(self.task["wanted"] in reply)

    def _secret(self) -> str:
        return "no tool"


class Counter:
    """An object as TRL's `environment_factory` makes them."""

    def __init__(self, first: int = 0) -> None:
        self._count = first

    def reset(self, up_to: int, **row: Any) -> str:
        self._up_to = up_to
        return f"Count up to {up_to}."

    def step(self, by: int) -> str:
        """Count on.

        Args:
            by: How far.
        """
        self._count += by
        return str(self._count)

    def call(self) -> str:
        """Call out."""
        return "yes?"

    async def get_reward(self) -> float:
        await asyncio.sleep(0)
        return float(self._count == self._up_to)


def made_counter(first: int) -> Counter:
    return Counter(first)
