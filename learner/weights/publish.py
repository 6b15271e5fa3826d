"""Publishing: the learner's weights to every generator, and the proof that they arrived.

Three proofs, cheapest first. Every bucket carries a checksum that the generator verifies before a
tensor is loaded. vLLM's protocol refuses half an update. And the canary (`learner.weights.canary`)
catches what the other two cannot: weights that arrived but are not used.

What arrives damaged is sent again as a whole, for nothing of it was loaded. Weights that the canary
refutes have been sampled from, under the number of the right ones. So the run starts again from its
last checkpoint, which gives up every group with a token of them.

The version with which a run begins is published too, before anything is sampled. An architecture
that learner and engine compute differently, or whose updates the engine garbles, is found then.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass
from typing import Any, Protocol

from common.errors import RefutedError, UserError, WeightsError
from common.supervision.faults import reached
from common.weights.transport import (
    GeneratorSide,
    LearnerSide,
    Shipment,
    Sides,
    WeightTransport,
)
from learner.weights.canary import CanaryProof

log = logging.getLogger(__name__)

_COMPUTED_DIFFERENTLY = (
    "Nothing has been published yet: both have read the same folder, and vLLM computes this model "
    "otherwise than transformers. No restart mends that. Lower model.max_length below the model's "
    "window or original length if it is longer, or train another model."
)
_GARBLED = (
    "vLLM computed right with the weights of the model's folder, and wrong after an update with "
    "the very same: it cannot be updated with this architecture here. No restart mends that. "
    "Train another model, or set weights.publish=merged where adapters travel alone."
)


class Generators(GeneratorSide, Protocol):
    """All generators, as publishing sees them."""

    def now_hold(self, version: int) -> None:
        """Take note that all of them have got the weights of `version`."""
        ...

    async def score(
        self, sequences: list[list[int]], prompt_lengths: list[int], deadline_s: float
    ) -> dict[str, list[list[float]]]: ...


@dataclass(frozen=True)
class Exported:
    """A version on its way: it no longer needs the learner."""

    version: int
    shipment: Shipment
    seconds: float
    """What the export took."""


class Publisher:
    """Moves weights from learner to generators, version by version.

    It does so in two halves: `export` needs the learner as it is, `deliver` does not. So the
    learner's next step may begin while the generators still load.
    """

    def __init__(
        self,
        learner: LearnerSide,
        generators: Generators,
        transport: WeightTransport,
        proof: CanaryProof,
        deadline_s: float,
        resends: int = 0,
    ) -> None:
        """`resends`: times that weights which arrive damaged are sent again as a whole."""
        self._generators = generators
        self._sides = Sides(learner, generators, deadline_s)
        self._transport = transport
        self._proof = proof
        self._deadline_s = deadline_s
        self._resends = resends

    @property
    def gap(self) -> float:
        """The largest gap of the newest version proved, in nats a token."""
        return self._proof.gap

    @property
    def shares_devices(self) -> bool:
        """Generators must stand still while the learner steps."""
        return self._transport.shares_devices

    async def make_room(self) -> None:
        """Prepare the devices for a step of the learner."""
        await self._transport.make_room(self._sides)

    async def export(self, version: int) -> Exported:
        """Take the learner's weights and its own scores of the canary under them."""
        started = time.monotonic()
        shipment = await self._transport.export(self._sides, version)
        await self._proof.expect(version)
        await self._transport.serve_again(self._sides)
        return Exported(version, shipment, time.monotonic() - started)

    async def deliver(self, exported: Exported) -> dict[str, float]:
        """Bring every generator to the exported version and prove it.

        What arrives damaged is sent again, `resends` times at most.

        Returns:
            Metrics of the publication.

        Raises:
            WeightsError: the weights arrived damaged, after `resends` more attempts.
            RefutedError: a generator does not reproduce the learner's log-probabilities.
            StallError: the deadline passed.
        """
        started, version, shipment = time.monotonic(), exported.version, exported.shipment
        for resent in range(self._resends + 1):
            try:
                stall_s = await self._transport.deliver(self._sides, shipment, version)
            except WeightsError as error:
                if resent == self._resends:
                    raise
                log.warning("version %d is sent again: %s", version, error)
            else:
                break
        self._generators.now_hold(version)
        reached("weights delivered")
        gap = await self._prove(version)
        reached("weights proved")
        return {
            "publish/stall": stall_s,
            "publish/bytes": float(shipment.nbytes),
            "publish/resends": float(resent),
            "canary/gap": gap,
            "time/export": exported.seconds,
            "time/publish": exported.seconds + time.monotonic() - started,
        }

    async def until_proved(self, version: int, delivery: asyncio.Future[Any]) -> None:
        """Return when `version` is proved, as `CanaryProof.until_proved` does."""
        await self._proof.until_proved(version, delivery)

    async def begin(self, version: int, *, loaded: bool) -> None:
        """Prove the version with which a run begins, and that it can be published.

        Nothing is being generated yet.

        Args:
            loaded: the generators have read it from its folder, as the learner has.

        Raises:
            UserError: a generator computes this model otherwise than the learner, or garbles what
                it is sent. It would again, however often it is started.
        """
        if loaded:
            # The first pass of each side takes long, and they are on different processors.
            theirs, _ = await asyncio.gather(self._score(), self._proof.expect(version))
            try:
                self._proof.prove(version, theirs)
            except RefutedError as error:
                raise UserError(f"{error}\n{_COMPUTED_DIFFERENTLY}") from error
        await self.make_room()
        try:
            await self.deliver(await self.export(version))
        except RefutedError as error:
            raise UserError(f"{error}\n{_GARBLED}") from error

    async def _prove(self, version: int) -> float:
        return self._proof.prove(version, await self._score())

    async def _score(self) -> dict[str, list[list[float]]]:
        """What every generator scores the canary."""
        canary = self._proof.canary
        return await self._generators.score(
            canary.sequences, canary.prompt_lengths, self._deadline_s
        )
