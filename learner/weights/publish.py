"""Publishing: the learner's weights to every generator, and the proof that they arrived.

There are three proofs, cheapest first. A bucket carries a checksum, which the generator verifies
before a tensor is loaded. vLLM's protocol refuses half an update. And the *canary*: learner and
every generator score fixed token sequences after the update, and the gap must stay below a
tolerance. The canary catches what the other two cannot: weights that arrived but are not used.

What arrives damaged is sent again as a whole, for nothing of it was loaded. Weights that the canary
refutes have been sampled from, under the number of the right ones. So the run starts again from its
last checkpoint, which gives up every group with a token of them.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass
from typing import Any, Protocol

from common.errors import UserError, WeightsError
from common.supervision.faults import reached
from common.weights.transport import (
    GeneratorSide,
    LearnerSide,
    Scorer,
    Shipment,
    Sides,
    WeightTransport,
)

log = logging.getLogger(__name__)


class Learner(LearnerSide, Protocol):
    """All ranks of the learner, as publishing sees them."""

    async def score(
        self, sequences: list[list[int]], prompt_lengths: list[int]
    ) -> list[list[float]]: ...


class Generators(GeneratorSide, Protocol):
    """All generators, as publishing sees them."""

    version: int
    """Number of the weights that all of them hold."""

    async def score(
        self, sequences: list[list[int]], prompt_lengths: list[int], deadline_s: float
    ) -> dict[str, list[list[float]]]: ...


@dataclass(frozen=True)
class Canary:
    """Fixed sequences, of which the tokens behind the first `prompt_lengths` are scored."""

    sequences: list[list[int]]
    prompt_lengths: list[int]

    @classmethod
    def from_prompts(cls, prompts: list[list[int]], scored_tokens: int) -> Canary:
        """Score the last `scored_tokens` tokens of each prompt, but never its first.

        Raises:
            UserError: no prompt has a second token.
        """
        long = [ids for ids in prompts if len(ids) > 1]
        if not long:
            raise UserError(
                f"none of {len(prompts)} prompts has two tokens, and the canary, which proves the "
                "generators' weights, scores those behind the first: use another data.template"
            )
        return cls(long, [max(1, len(ids) - scored_tokens) for ids in long])


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
        learner: Learner,
        generators: Generators,
        transport: WeightTransport,
        canary: Canary,
        tolerance: float,
        deadline_s: float,
        resends: int = 0,
    ) -> None:
        self._learner = learner
        self._generators = generators
        self._sides = Sides(learner, generators, deadline_s)
        self._transport = transport
        self._canary = canary
        self._tolerance = tolerance
        self._deadline_s = deadline_s
        self._resends = resends
        self.proved = -1
        """The newest version whose canary every generator has passed."""
        self._news = asyncio.Event()
        """Set when `proved` moves on."""
        self._expected: dict[int, list[list[float]]] = {}
        """The learner's scores of the canary, by version; the last two."""

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
        await self._score(version)
        return Exported(version, shipment, time.monotonic() - started)

    async def _score(self, version: int) -> None:
        """The learner's scores, while it is at `version`."""
        older = {known: self._expected[known] for known in sorted(self._expected)[-1:]}
        scores = await self._learner.score(self._canary.sequences, self._canary.prompt_lengths)
        self._expected = older | {version: scores}

    async def deliver(self, exported: Exported) -> dict[str, float]:
        """Bring every generator to the exported version and prove it.

        What arrives damaged is sent again, `resends` times at most.

        Returns:
            Metrics of the publication.

        Raises:
            WeightsError: the weights arrived damaged, after `resends` more attempts, or a
                generator does not reproduce the learner's log-probabilities.
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
        self._generators.version = version
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
        """Return when `version` is proved, by `delivery` at the latest.

        Whatever the delivery does after the proof, such as an evaluation, is not waited for.

        Raises:
            Exception: what the delivery raised.
        """
        while self.proved < version and not delivery.done():
            self._news.clear()
            news = asyncio.ensure_future(self._news.wait())
            await asyncio.wait((news, delivery), return_when=asyncio.FIRST_COMPLETED)
            news.cancel()
        if delivery.done():
            delivery.result()

    async def prove(self, version: int) -> float:
        """Score the canary on both sides; returns the largest mean gap of a sequence, nats a token.

        Raises:
            WeightsError: a generator does not reproduce the learner's log-probabilities.
        """
        await self._score(version)
        return await self._prove(version)

    async def prove_newcomer(self, name: str, version: int, score: Scorer) -> None:
        """Prove a generator that comes in the place of another, before it serves.

        Two cases need no proof here. Before the first proof of all there is nothing to compare
        with, and the newcomer will be among those proved. A version with two newer ones is out of
        date, and the newcomer will have to load those.

        Raises:
            WeightsError: it does not have the weights of `version`.
        """
        ours = self._expected.get(version)
        if ours is not None:
            theirs = await score(self._canary.sequences, self._canary.prompt_lengths)
            self._check(version, ours, {name: theirs})

    async def _prove(self, version: int) -> float:
        sequences, lengths = self._canary.sequences, self._canary.prompt_lengths
        theirs = await self._generators.score(sequences, lengths, self._deadline_s)
        gap = self._check(version, self._expected[version], theirs)
        self.proved = version
        self._news.set()
        return gap

    def _check(
        self, version: int, ours: list[list[float]], theirs: dict[str, list[list[float]]]
    ) -> float:
        gaps = {name: largest_gap(ours, scores) for name, scores in theirs.items()}
        worst = max(gaps, key=gaps.__getitem__)
        if not gaps[worst] <= self._tolerance:
            raise WeightsError(
                f"after publishing version {version}, {worst} scores the canary "
                f"{gaps[worst]:.4f} nats a token away from the learner (tolerance "
                f"weights.canary_tolerance={self._tolerance:g}).\n"
                f"learner:   {_shown(ours)}\n{worst}: {_shown(theirs[worst])}\n"
                "Its weights are not the learner's: no token of them is trained on, the run goes "
                "back to its last checkpoint."
            )
        return gaps[worst]


def largest_gap(ours: list[list[float]], theirs: list[list[float]]) -> float:
    """Largest over sequences of the mean absolute difference over tokens; NaN stays NaN."""
    gaps = [
        sum(abs(a - b) for a, b in zip(mine, other, strict=True)) / len(mine)
        for mine, other in zip(ours, theirs, strict=True)
    ]
    return float("nan") if any(gap != gap for gap in gaps) else max(gaps)


def _shown(scores: list[list[float]]) -> str:
    return " ".join(f"{score:.3f}" for score in scores[0][:8])
