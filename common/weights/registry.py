"""The weight transports by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from common.weights.device_to_device import Ipc, Nccl
from common.weights.object_store import ObjectStore
from common.weights.transport import WeightTransport

TransportName = Literal["object_store", "nccl", "ipc"]
PublishName = Literal["merged", "adapter"]

TRANSPORTS: dict[str, WeightTransport] = {
    transport.name: transport for transport in (ObjectStore(), Nccl(), Ipc())
}
"""Keys are those of `TransportName`."""


def names_where(fact: Callable[[WeightTransport], bool]) -> str:
    """The transports of which `fact` is true, for a message."""
    return " or ".join(name for name, transport in TRANSPORTS.items() if fact(transport))
