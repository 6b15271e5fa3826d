"""The generation loop: prompts become groups, groups become batches for the learner.

    run      waits for slots of the budget, takes prompts, dispatches their groups; for ever
    _group   one group's way, a task of its own: sampled, judged, followed up, logged, settled

A group that cannot be trained on is dropped: it has no usable reward, or no difference in reward
(with dynamic sampling), or it ran into `generator.group_cap_s`. Its slot is free at once, and
another prompt goes out. All other slots come back from the learner's loop, through the book.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pyarrow as pa

from actors.data.prompts import Prompt, PromptSource
from actors.rollout.episodes import Episodes, GroupSampling
from actors.rollout.group_book import GroupBook
from actors.rollout.guidance import Guidance
from common.errors import VerifierError
from common.record.writer import TrajectoryLogClient
from common.supervision.calls import Ref
from common.trajectory import Behind, GroupReceipt, GroupRequest, group_seed

_UNJUDGED_LIMIT = 16
"""Groups in a row without a single reward that end the run."""


class RolloutLoop:
    """Keeps as many groups under way as the book has slots. One per run, in the coordinator."""

    def __init__(
        self,
        *,
        source: PromptSource,
        episodes: Episodes,
        book: GroupBook,
        log: TrajectoryLogClient,
        guidance: Guidance,
        sampling: GroupSampling,
        seed: int | None,
        behind: Callable[[Prompt, int], tuple[Behind, ...]] | None = None,
    ) -> None:
        """`seed`: a synchronous run's, which samples the same for a ticket in whatever process it
        is served. None leaves the samples to the engines' random state.

        `behind`: (prompt, version) -> what each completion of its group is sampled behind. None:
        the prompt."""
        self._source = source
        self._episodes = episodes
        self._book = book
        self._log = log
        self._guidance = guidance
        self._sampling = sampling
        self._seed, self._behind = seed, behind
        self._unjudged_in_a_row = 0

    async def run(self) -> None:
        """Dispatch groups for ever; an error in any group ends the loop with that error."""
        async with asyncio.TaskGroup() as groups:
            while True:
                free = await self._book.slots()
                requests = [self._request(self._source.next()) for _ in range(free)]
                self._book.dispatched(requests)
                for request in requests:
                    groups.create_task(self._group(request))

    def _request(self, prompt: Prompt) -> GroupRequest:
        return self._episodes.request(
            prompt,
            self._sampling,
            group_id=self._book.new_group_id(),
            guided=self._guidance.start(
                prompt, self._source.encode, self._sampling.num_completions
            ),
            behind=self._behind(prompt, self._episodes.version) if self._behind else (),
            seed=group_seed(self._seed, prompt.ticket),
        )

    async def _group(self, request: GroupRequest) -> None:
        receipt = None
        if refs := await self._episodes.run(request):
            if request.follow_up is not None:
                request, refs = await self._followed_up(request, refs)
            receipt = await self._log.append(request.group_id, refs, self._book.verified)
            await self._check_judged(receipt)
        await self._book.settle(request, receipt)

    async def _followed_up(
        self, request: GroupRequest, refs: list[Ref[pa.RecordBatch]]
    ) -> tuple[GroupRequest, list[Ref[pa.RecordBatch]]]:
        """The request for all of a group, and all of its batches."""
        assert request.follow_up is not None
        for _ in range(request.follow_up.stages):
            request, later = await self._stage(request, refs)
            if not later:
                break
            refs = [*refs, *later]
        return request, refs

    async def _stage(
        self, request: GroupRequest, refs: list[Ref[pa.RecordBatch]]
    ) -> tuple[GroupRequest, list[Ref[pa.RecordBatch]]]:
        """Ask for more of a group once: the request for all of it, and what came."""
        whole = request

        def asked(more: int) -> None:
            nonlocal whole
            if more:
                whole = self._book.followed_up(request, more)

        later = await self._episodes.follow_up(request, refs, asked)
        return whole, later

    async def _check_judged(self, receipt: GroupReceipt) -> None:
        """End a run whose verifiers judge nothing: its groups would be dropped for ever."""
        self._unjudged_in_a_row = self._unjudged_in_a_row + 1 if receipt.unjudged else 0
        if self._unjudged_in_a_row >= _UNJUDGED_LIMIT:
            reasons = await self._episodes.failures()
            listed = "\n".join(f"  {n} times: {why}" for why, n in reasons.most_common(5))
            raise VerifierError(
                f"{_UNJUDGED_LIMIT} groups in a row got no reward: mend the verifier, or "
                f"the environment where episodes have one.\n{listed}"
            )
