"""The canary: fixed token sequences that prove which weights a generator computes with.

Learner and generators score the same sequences under the same version. The mean gap of any of them
must stay below a tolerance: two engines round differently, other weights are far off.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any, Protocol

from common.errors import UserError, WeightsError
from common.weights.transport import Scorer


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


class ScoringLearner(Protocol):
    """The learner, as a proof sees it."""

    async def score(
        self, sequences: list[list[int]], prompt_lengths: list[int]
    ) -> list[list[float]]:
        """Log-probabilities of what comes after the prompts, under the learner's weights."""
        ...


class CanaryProof:
    """Compares generators with the learner, version by version."""

    def __init__(self, learner: ScoringLearner, canary: Canary, tolerance: float) -> None:
        """`tolerance`: the largest mean gap of a sequence that passes, in nats a token."""
        self.canary = canary
        self.proved = -1
        """The newest version whose canary every generator has passed."""
        self._learner = learner
        self._tolerance = tolerance
        self._news = asyncio.Event()
        """Set when `proved` moves on."""
        self._expected: dict[int, list[list[float]]] = {}
        """The learner's scores, by version; the last two."""

    async def expect(self, version: int) -> None:
        """Take the learner's scores, while it is at `version`."""
        older = {known: self._expected[known] for known in sorted(self._expected)[-1:]}
        scores = await self._learner.score(self.canary.sequences, self.canary.prompt_lengths)
        self._expected = older | {version: scores}

    def prove(self, version: int, theirs: dict[str, list[list[float]]]) -> float:
        """Accept what all generators scored at `version`; the largest gap, in nats a token.

        Raises:
            WeightsError: one does not have the weights of `version`.
        """
        gap = self._check(version, self._expected[version], theirs)
        self.proved = version
        self._news.set()
        return gap

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
            theirs = await score(self.canary.sequences, self.canary.prompt_lengths)
            self._check(version, ours, {name: theirs})

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
