"""What a weight transport is: facts about it, and what each of three sides does.

    WeightTransport    one way from the learner to the generators
    Sides              the learner and the generators, as the coordinator sees them
    SendingRank        a rank of the learner, as its transport sees it
    Shipment           a version that has left the learner

A transport is one class in one file, and a line in `common.weights.registry`. Every process has an
object of the class. Heavy libraries are imported where they are used: the configuration is checked
against the facts before any of them is loaded.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from common.supervision.calls import Handle, Ref

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

    from common.weights.buckets import WeightBucket

    StoredBucket = WeightBucket[Ref[npt.NDArray[np.uint8]]]

Scorer = Callable[[list[list[int]], list[int]], Awaitable[list[list[float]]]]
"""Sequences and prompt lengths in, log-probabilities behind the prompts out, in nats."""

Proof = Callable[[str, int, Scorer], Awaitable[None]]
"""Given a generator's name, the version it should hold, and what asks it to score; raises
`WeightsError` unless it scores as the learner does."""


@dataclass(frozen=True)
class Shipment:
    """A version of the weights that has left the learner."""

    nbytes: int
    buckets: list[StoredBucket] = field(default_factory=list)
    """What generators have yet to take; empty where they hold the weights already."""
    stall_s: float = 0.0
    """Seconds for which generation stood still on the way so far."""


class WeightReceiver(Protocol):
    """A generator's actor, as a learner's rank calls it."""

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
        """Close the update and go on; returns the seconds for which generation stood still."""
        ...


class WeightLoader(Protocol):
    """A generator's engine, as its transport sees it."""

    @property
    def in_process(self) -> bool:
        """Whether vLLM's worker runs in this process."""
        ...

    async def update(self, update_infos: list[dict[str, Any]], version: int) -> float:
        """Load a whole update; returns the seconds for which generation stood still."""
        ...


class FullWeights(Protocol):
    """The policy's whole tensors, under their names in a Hugging Face checkpoint; or those of its
    adapters, under their names in a file of peft's."""

    def shapes(self) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
        """Name, type and shape of every tensor, in the order of `tensors`."""
        ...

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor on the rank's device, one by one. Collective: exhaust it."""
        ...


@dataclass(frozen=True)
class SendingRank:
    """A rank of the learner, as its transport sees it."""

    rank: int
    weights: FullWeights
    bucket_bytes: int
    """Largest bucket."""
    put: Callable[[npt.NDArray[np.uint8]], Ref[npt.NDArray[np.uint8]]]
    """Stores a buffer."""
    agree_on_address: Callable[[], tuple[str, int]]
    """Host and free port of rank 0, the same on all ranks. Collective."""


@dataclass(frozen=True)
class Receivers:
    """The generators that a learner's rank calls."""

    handles: Sequence[Handle[WeightReceiver]]
    workers_each: int
    """Processes of a generator that take part."""
    deadline_s: float
    """For each call."""


class Sender(Protocol):
    """A rank's end of a transport."""

    def send(self, version: int) -> Shipment:
        """Send the weights as they are now. Collective; rank 0's answer counts."""
        ...


class LearnerSide(Protocol):
    """All ranks of the learner, as the coordinator sees them."""

    async def export_weights(self, version: int) -> Shipment: ...

    async def release_memory(self, deadline_s: float) -> None: ...


class GeneratorSide(Protocol):
    """All generators, as the coordinator sees them."""

    async def update_weights(
        self, buckets: list[StoredBucket], version: int, deadline_s: float
    ) -> float: ...

    async def sleep(self, deadline_s: float) -> None: ...

    async def wake(self, part: Literal["weights", "cache"], deadline_s: float) -> None: ...


@dataclass(frozen=True)
class Sides:
    """Both ends of a transport, in the coordinator."""

    learner: LearnerSide
    generators: GeneratorSide
    deadline_s: float


class WeightTransport(ABC):
    """One way for weights from the learner to the generators. It has no state of its own."""

    name: ClassVar[str]
    """The value of `weights.transport`, and vLLM's name of the generators' part."""
    needs_cuda: ClassVar[bool]
    shares_devices: ClassVar[bool]
    """A generator and a learner rank are on every device and take turns: generators sleep while the
    learner steps."""
    one_collective: ClassVar[bool]
    """Learner and generators send together: all generators from start to end, or none."""
    survives_a_death: ClassVar[bool]
    """A generator in the place of a dead one can get the weights."""
    carries_adapters: ClassVar[bool] = False
    """Adapters can travel by it alone, without the weights beside them."""
    generator_environment: ClassVar[Mapping[str, str]] = {}
    """Environment variables that generators need for it."""

    @abstractmethod
    def open(self, rank: SendingRank, receivers: Receivers) -> Sender:
        """Make this rank's end, on every rank of the learner at the same time.

        Raises:
            UserError: it does not run on this machine.
        """

    async def receive(
        self, engine: WeightLoader, buckets: list[StoredBucket], version: int
    ) -> float:
        """Load a shipment's buckets in a generator; returns the seconds generation stood still.

        Raises:
            WeightsError: a bucket is not what the learner packed. Nothing has been loaded.
        """
        raise NotImplementedError(f"weights.transport={self.name} delivers no buckets")

    async def make_room(self, sides: Sides) -> None:
        """Prepare for a step of the learner: nothing by default.

        Where devices are shared, nothing is being generated.
        """
        return

    async def export(self, sides: Sides, version: int) -> Shipment:
        """Take the weights out of the learner, which may step again afterwards."""
        return await sides.learner.export_weights(version)

    async def serve_again(self, sides: Sides) -> None:
        """Have generators serve that made room: nothing by default.

        The learner has sent the weights and computes nothing until its next step.
        """
        return

    async def deliver(self, sides: Sides, shipment: Shipment, version: int) -> float:
        """Bring every generator to `version`; returns the longest stall of generation, seconds.

        By default the export has done so.
        """
        return shipment.stall_s
