"""What a learner and a generator must agree on to move weights between them."""

from __future__ import annotations

from typing import Any, Protocol


class WeightReceiver(Protocol):
    """A generator, as vLLM's own transports see it from the learner (nccl, ipc)."""

    async def init_weight_transfer(self, init_info: dict[str, Any]) -> None:
        """Pass the transport's start-up parameters to the engine."""
        ...

    async def begin_update(self) -> None:
        """Freeze generation and open an update."""
        ...

    async def receive_weights(self, update_info: dict[str, Any]) -> None:
        """Take part of an update as the transport describes it."""
        ...

    async def end_update(self, version: int) -> float:
        """Close the update and go on; returns the seconds generation stood still."""
        ...
