"""Held-out evaluation: greedy, through the same generators and verifiers as training.

The prompts never serve in training (see `actors.data.prompts`). An evaluation runs beside the
learner's next step, and the next version waits for its end: every completion of it comes from one
version.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

from actors.data.prompts import Prompt
from actors.rollout.pools import GeneratorPool, GroupLostError, VerifierPool
from common.config.sections import EvalConfig
from common.record.writer import TrajectoryLogClient
from common.trajectory import GroupRequest


class Evaluator:
    """Scores a fixed list of prompts."""

    def __init__(
        self,
        *,
        prompts: list[Prompt],
        generators: GeneratorPool,
        verifiers: VerifierPool,
        log: TrajectoryLogClient,
        config: EvalConfig,
        max_tokens: int,
    ) -> None:
        self._prompts = prompts
        self._generators = generators
        self._verifiers = verifiers
        self._log = log
        self._config = config
        self._max_tokens = config.max_completion_tokens or max_tokens

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
        summary = await self._log.write_evaluation(step, refs, self._config.timeout_s)
        return {**summary, "time/eval": time.monotonic() - started}

    async def _one(self, index: int, prompt: Prompt) -> Any:
        request = GroupRequest(
            group_id=-1 - index,
            ticket=-1,
            prompt_id=prompt.prompt_id,
            epoch=0,
            prompt_text=prompt.text,
            prompt_ids=prompt.token_ids,
            reference=prompt.reference,
            num_completions=1,
            max_tokens=self._max_tokens,
            temperature=0.0,
            dispatch_version=self._generators.version,
            dispatched_s=time.time(),
        )
        timeout_s = self._config.timeout_s
        while True:
            try:
                rollouts = self._generators.generate(request, timeout_s)
                (rollout_ref,) = [ref async for ref in rollouts]  # one completion, one batch
                return await self._verifiers.score(request.group_id, rollout_ref, timeout_s)
            except GroupLostError:
                continue
