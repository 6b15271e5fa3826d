"""Held-out evaluation: greedy, by the same generators and verifiers as training.

The prompts never serve in training (see `actors.data.prompts`). An evaluation runs beside the
learner's next step, and the next version waits for its end: every completion of it comes from one
version.
"""

from __future__ import annotations

import asyncio
import time

import pyarrow as pa

from actors.data.prompts import Prompt
from actors.rollout.episodes import Episodes, GroupSampling
from common.record.writer import TrajectoryLogClient
from common.supervision.calls import Ref


class Evaluator:
    """Scores a fixed list of prompts."""

    def __init__(
        self,
        *,
        prompts: list[Prompt],
        episodes: Episodes,
        log: TrajectoryLogClient,
        max_tokens: int,
        log_timeout_s: float,
    ) -> None:
        self._prompts = prompts
        self._episodes = episodes
        self._log = log
        self._sampling = GroupSampling(num_completions=1, max_tokens=max_tokens, temperature=0.0)
        self._log_timeout_s = log_timeout_s

    async def run(self, step: int) -> dict[str, float]:
        """`eval/accuracy`: mean of the first verifier's reward; `eval/unscored`: verdicts missing.

        A completion without a verdict counts as wrong here, and is counted beside it.
        Without prompts (`eval.prompts=0`) there is nothing to say.
        """
        if not self._prompts:
            return {}
        started = time.monotonic()
        refs = await asyncio.gather(
            *[self._one(index, prompt) for index, prompt in enumerate(self._prompts)]
        )
        summary = await self._log.write_evaluation(step, refs, self._log_timeout_s)
        return {**summary, "time/eval": time.monotonic() - started}

    async def _one(self, index: int, prompt: Prompt) -> Ref[pa.RecordBatch]:
        """Reference to the prompt's one completion. Numbers below 0 are no group's of training."""
        request = self._episodes.request(prompt, self._sampling, group_id=-1 - index)
        (judged,) = await self._episodes.run(request)
        return judged
