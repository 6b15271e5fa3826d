"""The canary: fixed token sequences that prove which weights a generator computes with.

Learner and generators score the same sequences under the same version. The mean gap of any of them
must stay below a limit: two engines round differently, other weights are far off. How differently
they round is a matter of the model, and of its logits, whose steps in bfloat16 grow with them. So a
version is held to a tolerance, and to a multiple of the largest gap of those before it: rounding
grows with the logits over many versions, other weights are a jump. A version that is published
again must leave a generator's own scores as they were.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from itertools import chain, cycle, islice
from typing import Any, Protocol

from common.errors import RefutedError, UserError
from common.weights.transport import Scorer

_QUIET = 0.05
"""Share of the tolerance by which a generator's own scores may move under the same weights, however
small the first gap was."""

_ROUNDING = 0.25
"""Share of the tolerance that is rounding in any case, however small the gaps before were. In
bfloat16 it is 0.05 nats a token, which logits of 25 come to (`tests/learner/test_canary.py`)."""


@dataclass(frozen=True)
class Canary:
    """Fixed sequences, of which the tokens behind the first `prompt_lengths` are scored."""

    sequences: list[list[int]]
    prompt_lengths: list[int]

    @classmethod
    def from_prompts(
        cls, prompts: list[list[int]], scored_tokens: int, reach: int = 0, max_length: int = 0
    ) -> Canary:
        """Score the last `scored_tokens` tokens of each prompt, but never its first.

        Args:
            reach: a range in tokens behind which the model computes otherwise, as a window. One
                more sequence, all prompts in turns, goes past it. 0 where there is none.
            max_length: with `reach`: no sequence is this long.

        Raises:
            UserError: no prompt has a second token.
        """
        long = [ids for ids in prompts if len(ids) > 1]
        if not long:
            raise UserError(
                f"none of {len(prompts)} prompts has two tokens, and the canary, which proves the "
                "generators' weights, scores those behind the first: use another data.template"
            )
        if reach:
            tokens = min(reach + scored_tokens, max_length - 1)
            long.append(list(islice(cycle(chain(*long)), tokens)))
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

    def __init__(
        self, learner: ScoringLearner, canary: Canary, tolerance: float, growth: float
    ) -> None:
        """Nothing is proved yet.

        Args:
            tolerance: the largest mean gap of a sequence that passes, in nats a token.
            growth: the largest gap that passes, as a multiple of the largest of older versions.
        """
        self.canary = canary
        self.proved = -1
        """The newest version whose canary every generator has passed."""
        self.gap = float("nan")
        """The largest gap of that version."""
        self._learner = learner
        self._tolerance = tolerance
        self._growth = growth
        self._first_gap: float | None = None
        self._largest_gap = 0.0
        """That of all versions proved."""
        self._scored: dict[str, list[list[float]]] = {}
        """What generators scored at the newest version proved."""
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
            RefutedError: one does not have the weights of `version`.
        """
        gap = self._check(version, self._expected[version], theirs)
        if version == self.proved:
            self._check_unchanged(version, theirs)
        if self._first_gap is None:
            self._first_gap = gap
        self._largest_gap = max(self._largest_gap, gap)
        self.proved, self.gap, self._scored = version, gap, theirs
        self._news.set()
        return gap

    async def prove_newcomer(self, name: str, version: int, score: Scorer) -> None:
        """Prove a generator that comes in the place of another, before it serves.

        Two cases need no proof here. Before the first proof of all there is nothing to compare
        with, and the newcomer will be among those proved. A version with two newer ones is out of
        date, and the newcomer will have to load those.

        Raises:
            RefutedError: it does not have the weights of `version`.
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

    @property
    def _limit(self) -> float:
        """The largest gap that passes."""
        if self._first_gap is None:
            return self._tolerance
        grown, rounding = self._growth * self._largest_gap, _ROUNDING * self._tolerance
        return min(self._tolerance, max(grown, rounding))

    def _check(
        self, version: int, ours: list[list[float]], theirs: dict[str, list[list[float]]]
    ) -> float:
        gaps = {name: largest_gap(ours, scores) for name, scores in theirs.items()}
        worst = max(gaps, key=gaps.__getitem__)
        if not gaps[worst] <= self._limit:
            raise RefutedError(
                f"at version {version}, {worst} scores the canary {gaps[worst]:.4f} nats a token "
                f"away from the learner. {self._why_not()}\n"
                f"learner:   {_shown(ours)}\n{worst}: {_shown(theirs[worst])}"
            )
        return gaps[worst]

    def _why_not(self) -> str:
        if self._first_gap is None or self._limit == self._tolerance:
            return f"The most is weights.canary_tolerance={self._tolerance:g}."
        return (
            f"The largest gap of the versions before was {self._largest_gap:.2g}, and the most is "
            f"{self._limit:.2g}: weights.canary_growth={self._growth:g} times that, or "
            f"{_ROUNDING:.0%} of weights.canary_tolerance={self._tolerance:g}."
        )

    def _check_unchanged(self, version: int, theirs: dict[str, list[list[float]]]) -> None:
        """Weights that are published again are the same weights."""
        assert self._first_gap is not None
        most = max(self._first_gap, _QUIET * self._tolerance)
        for name in theirs.keys() & self._scored.keys():
            moved = largest_gap(self._scored[name], theirs[name])
            if not moved <= most:
                raise RefutedError(
                    f"version {version} was published to {name}, which held it already, and its "
                    f"own scores of the canary moved by {moved:.4f} nats a token. The most is "
                    f"{most:.2g}.\nbefore: {_shown(self._scored[name])}\n"
                    f"after:  {_shown(theirs[name])}"
                )


def largest_gap(ours: list[list[float]], theirs: list[list[float]]) -> float:
    """Largest over sequences of the mean absolute difference over tokens; NaN stays NaN."""
    gaps = [
        sum(abs(a - b) for a, b in zip(mine, other, strict=True)) / len(mine)
        for mine, other in zip(ours, theirs, strict=True)
    ]
    return float("nan") if any(gap != gap for gap in gaps) else max(gaps)


def _shown(scores: list[list[float]]) -> str:
    return " ".join(f"{score:.3f}" for score in scores[0][:8])
