"""From a prompt to judged completions: the one way there, for training and for every evaluation.

    request    a prompt and how to sample it  ->  `GroupRequest`
    run        a request  ->  references to trajectory batches, sampled and judged
    follow_up  these  ->  more of them, where their verdicts ask for it

An *episode* is what the policy does with one prompt, up to its reward; a group is G episodes of one
prompt. A request says nothing of turns: how an episode goes is the environment's business
(`actors.environments`), and callers only see what comes out.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass

import pyarrow as pa

from actors.data.prompts import Prompt
from actors.rollout.guidance import UNGUIDED, GuidedStart
from actors.rollout.pools import GeneratorPool, GroupLostError, VerifierPool
from common.config.follow_up import FollowUpConfig
from common.supervision.calls import Ref
from common.trajectory import Begun, Behind, GroupRequest


@dataclass(frozen=True)
class GroupSampling:
    """How every group of a loop is sampled."""

    num_completions: int
    max_tokens: int
    temperature: float
    cap_s: float | None = None
    """Seconds after which completions still being sampled are aborted and left out."""
    greedy: bool = False
    """Whether the first completion is sampled at temperature 0, for the others to compare with."""
    answer_pattern: str = ""
    """Regular expression of the answer in a completion; empty where nobody asks for its tokens."""
    follow_up: FollowUpConfig | None = None
    """What is asked for after the verdicts; None: nothing."""
    group_size: int = 0
    """Completions that the learner gets of a group with a follow-up."""


class Episodes:
    """Samples groups with the generators and has the verifiers judge them."""

    def __init__(
        self,
        generators: GeneratorPool,
        verifiers: VerifierPool,
        *,
        sample_timeout_s: float,
        judge_timeout_s: float,
    ) -> None:
        """Both times are for one group. When one has passed, the run ends: something hangs."""
        self._generators = generators
        self._verifiers = verifiers
        self._sample_timeout_s = sample_timeout_s
        self._judge_timeout_s = judge_timeout_s

    @property
    def version(self) -> int:
        """The weights with which a group is sampled that is asked for now."""
        return self._generators.version

    def request(
        self,
        prompt: Prompt,
        sampling: GroupSampling,
        *,
        group_id: int,
        guided: GuidedStart = UNGUIDED,
        begun: Begun | None = None,
        behind: tuple[Behind, ...] = (),
        seed: int | None = None,
    ) -> GroupRequest:
        """What `run` takes: sample `prompt` now, with the weights that the generators hold.

        Args:
            begun: what the group's episodes go on from; None: from the prompt.
            behind: what each completion is sampled behind; empty: all behind the prompt.
            seed: of the group's samples; None leaves them to the engine's random state.
        """
        return GroupRequest(
            group_id=group_id,
            ticket=prompt.ticket,
            prompt_id=prompt.prompt_id,
            epoch=prompt.epoch,
            source=prompt.source,
            question=prompt.question,
            prompt_text=prompt.text,
            prompt_ids=prompt.token_ids,
            reference=prompt.reference,
            num_completions=sampling.num_completions,
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            dispatch_version=self.version,
            dispatched_s=time.time(),
            guidance_ids=guided.token_ids,
            num_guided=guided.num_completions,
            mask_guidance=guided.mask,
            greedy=sampling.greedy,
            seed=seed,
            cap_s=sampling.cap_s,
            context_ids=prompt.context_ids,
            answer_pattern=sampling.answer_pattern,
            follow_up=sampling.follow_up,
            follow_up_ids=prompt.follow_up_ids,
            num_follow_up=sampling.group_size,
            behind=behind,
            begun=begun,
        )

    async def run(self, request: GroupRequest) -> list[Ref[pa.RecordBatch]]:
        """References to trajectory batches; none when no completion ended in time.

        A group whose generator dies is sampled again, under the same seed: nobody has seen a
        completion of it yet.

        Raises:
            ExceptionGroup: of what the pools raise, `StallError` at a deadline among it.
        """
        return await self._sampled_and_judged(
            request, lambda: self._generators.generate(request, self._sample_timeout_s)
        )

    async def follow_up(
        self,
        request: GroupRequest,
        judged: Sequence[Ref[pa.RecordBatch]],
        asked: Callable[[int], None],
    ) -> list[Ref[pa.RecordBatch]]:
        """What a group asks for after its verdicts, sampled and judged; often nothing.

        Args:
            judged: what `run` gave.
            asked: is told how many completions these are, before any is sampled; once more, and the
                same, where a generator dies.

        Raises: as `run`.
        """
        return await self._sampled_and_judged(
            request,
            lambda: self._generators.follow_up(request, judged, asked, self._sample_timeout_s),
        )

    async def _sampled_and_judged(
        self, request: GroupRequest, sample: Callable[[], AsyncIterator[Ref[pa.RecordBatch]]]
    ) -> list[Ref[pa.RecordBatch]]:
        """Completions are judged while others of the group are still being sampled."""
        while True:
            try:
                async with asyncio.TaskGroup() as judging:
                    parts = [
                        judging.create_task(
                            self._verifiers.score(request.group_id, one, self._judge_timeout_s)
                        )
                        async for one in sample()
                    ]
                return [part.result() for part in parts]
            except ExceptionGroup as group:
                if group.split(GroupLostError)[1] is not None:
                    raise

    async def failures(self) -> Counter[str]:
        """Why verifiers could not judge, and how often."""
        return await self._verifiers.failures(self._judge_timeout_s)
