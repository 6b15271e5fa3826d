"""The generation loop: prompts -> generators -> verifiers -> trajectory stream -> window.

    run      waits for a slot of the budget, takes a prompt, dispatches its group; for ever
    _group   one group's way, a task of its own: sampled, verified, logged, put into the window

Slots are given back by the learner's loop through `release`, once a new version is published.
A group without a usable reward, or (with dynamic sampling) without a difference in reward, is
dropped, and so is one that ran into `generator.group_cap_s`: its slot is free at once and another
prompt goes out.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from actors.data.prompts import Prompt, PromptSource
from actors.rollout.guidance import Guidance, num_guided
from actors.rollout.pools import GeneratorPool, GroupLostError, VerifierPool
from common.budget import GroupWindow, StalenessBudget, in_time
from common.config.sections import Config
from common.errors import StallError, UserError, VerifierError
from common.record.ledger import Ledger, OpenGroup, Outcome, Outcomes, outcomes_of
from common.record.writer import TrajectoryLogClient
from common.supervision.faults import reached
from common.supervision.waits import Waits, until
from common.trajectory import GroupReceipt, GroupRequest, ticket_seed

_UNJUDGED_LIMIT = 16
"""Groups in a row without a single reward that end the run."""


@dataclass
class RolloutCounts:
    """Since the run, or its last resume, began."""

    groups_dispatched: int = 0
    groups_filtered: int = 0
    groups_abandoned: int = 0
    tokens_generated: int = 0


class RolloutLoop:
    """Keeps the budget's groups under way. One per run, in the coordinator."""

    def __init__(
        self,
        config: Config,
        *,
        source: PromptSource,
        generators: GeneratorPool,
        verifiers: VerifierPool,
        log: TrajectoryLogClient,
        guidance: Guidance,
        ledger: Ledger,
        waits: Waits,
        announce: Callable[[GroupReceipt], None] | None = None,
    ) -> None:
        """`announce`: told of every group that is ready to be trained on, before it is taken."""
        self._source = source
        self._generators = generators
        self._verifiers = verifiers
        self._log = log
        self._config = config.generator
        self._rollout = config.algorithm.rollout
        self._group_size = config.batch.group_size
        self._groups_per_step = config.groups_per_step
        self._seed = config.seed
        self._verify_timeout_s = config.verify_timeout_s
        self.guidance = guidance
        self._waits = waits
        self._announce = announce
        staleness = config.generator.max_staleness
        self._max_staleness = staleness
        self._budget = StalenessBudget(staleness, self._groups_per_step)
        self._window = GroupWindow(staleness, self._groups_per_step)
        self._changed = asyncio.Condition()
        self._ledger = ledger
        self._next_group_id = ledger.next_group_id()
        self.counts = RolloutCounts()
        self._unjudged_in_a_row = 0

    async def run(self) -> None:
        """Dispatch groups for ever; an error in any group ends the loop with that error."""
        async with asyncio.TaskGroup() as groups:
            while True:
                await until(self._changed, self._budget.try_acquire)
                groups.create_task(self._group(self._dispatch(self._source.next())))

    def _dispatch(self, prompt: Prompt) -> GroupRequest:
        guidance_ids = self._guidance_ids(prompt)
        guided = num_guided(self._group_size, self._rollout.guidance.ratio)
        request = GroupRequest(
            group_id=self._next_group_id,
            ticket=prompt.ticket,
            prompt_id=prompt.prompt_id,
            epoch=prompt.epoch,
            prompt_text=prompt.text,
            prompt_ids=prompt.token_ids,
            reference=prompt.reference,
            num_completions=self._group_size,
            max_tokens=self._config.max_completion_tokens,
            temperature=self._config.temperature,
            dispatch_version=self._generators.version,
            dispatched_s=time.time(),
            guidance_ids=guidance_ids,
            num_guided=guided if guidance_ids else 0,
            mask_guidance=self._rollout.guidance.mask,
            seed=self._seed_of(prompt.ticket) if self._max_staleness == 0 else None,
            cap_s=self._config.group_cap_s,
        )
        self._next_group_id += 1
        self.counts.groups_dispatched += 1
        self._ledger.dispatched(request)
        self._window.dispatch(request.group_id, request.dispatch_version)
        reached("group dispatched")
        return request

    def _seed_of(self, ticket: int) -> int:
        """A synchronous run samples the same for a ticket in whatever process it is served."""
        return ticket_seed(self._seed, ticket)

    def _guidance_ids(self, prompt: Prompt) -> tuple[int, ...]:
        """The solution's first tokens; all of a shorter one."""
        length = self.guidance.length
        if length < 1:
            return ()
        if prompt.solution is None:
            raise UserError(
                f"prompt {prompt.prompt_id} has no reference solution to guide with: set "
                "data.solution_column, or algorithm.rollout.guidance.ratio=0"
            )
        return tuple(self._source.encode(prompt.solution)[:length])

    async def _group(self, request: GroupRequest) -> None:
        refs = await self._verified(request)
        receipt = await self._logged(request.group_id, refs) if refs else None
        if receipt is not None:
            await self._check_judged(receipt)
        async with self._changed:
            if receipt is None or receipt.num_completions < request.num_completions:
                self.counts.groups_abandoned += 1
                tokens = receipt.num_tokens if receipt else 0
                self._drop(request.group_id, {"abandoned": (request.num_completions, tokens)})
            elif self._is_filtered(receipt):
                self.counts.groups_filtered += 1
                outcome: Outcome = "failed" if receipt.unjudged else "filtered"
                self._drop(request.group_id, outcomes_of(receipt, outcome))
            else:
                self._complete(receipt)
            self._changed.notify_all()

    def _complete(self, receipt: GroupReceipt) -> None:
        self._window.complete(receipt)
        if self._announce is not None:
            self._announce(receipt)

    async def _verified(self, request: GroupRequest) -> list[Any]:
        """References to trajectory batches; none when no completion ended in time.

        A group whose generator dies is sampled again: none of its completions is in the log yet.
        """
        while True:
            try:
                return await self._sampled_and_verified(request)
            except ExceptionGroup as group:
                if group.split(GroupLostError)[1] is not None:
                    raise

    async def _sampled_and_verified(self, request: GroupRequest) -> list[Any]:
        """Completions are verified while others of the group are still being sampled."""
        async with asyncio.TaskGroup() as verdicts:
            parts = [
                verdicts.create_task(
                    self._verifiers.score(request.group_id, rollout_ref, self._verify_timeout_s)
                )
                async for rollout_ref in self._generators.generate(
                    request, self._config.group_timeout_s
                )
            ]
        return [part.result() for part in parts]

    async def _logged(self, group_id: int, refs: list[Any]) -> GroupReceipt:
        receipt = await self._log.append(group_id, refs)
        reached("group in the log")
        self._ledger.verified(group_id, receipt.num_tokens)
        reached("group verified")
        self.counts.tokens_generated += receipt.num_tokens
        return receipt

    async def _check_judged(self, receipt: GroupReceipt) -> None:
        """End a run whose verifiers judge nothing: its groups would be dropped for ever."""
        self._unjudged_in_a_row = self._unjudged_in_a_row + 1 if receipt.unjudged else 0
        if self._unjudged_in_a_row >= _UNJUDGED_LIMIT:
            reasons = await self._verifiers.failures(self._verify_timeout_s)
            listed = "\n".join(f"  {n} times: {why}" for why, n in reasons.most_common(5))
            raise VerifierError(
                f"{_UNJUDGED_LIMIT} groups in a row got no reward: mend the verifier.\n{listed}"
            )

    def _drop(self, group_id: int, outcomes: Outcomes) -> None:
        """The group is not trained on; another prompt takes its place."""
        self._ledger.close_group(group_id, outcomes)
        self._window.drop(group_id)
        self._budget.release(1)

    def _is_filtered(self, receipt: GroupReceipt) -> bool:
        return receipt.unjudged or (self._rollout.dynamic_sampling and receipt.rewards_equal)

    async def take(self, version: int, deadline_s: float) -> list[GroupReceipt]:
        """The next step's groups (see `common.budget`). Raises `StallError` at the deadline."""
        receipts = await self._waits.on(
            until(self._changed, lambda: self._window.take(version)),
            owner="learner",
            cause=f"{self._groups_per_step} verified groups",
            deadline_s=deadline_s,
        )
        if not receipts:
            raise StallError("the window gave no groups")
        taken: list[GroupReceipt] = receipts
        return taken

    async def release(self) -> None:
        """A step's version is held by every generator: its slots are free."""
        async with self._changed:
            self._budget.release(self._groups_per_step)
            self._changed.notify_all()

    def trained(
        self, step: int, receipts: list[GroupReceipt], metrics: dict[str, float]
    ) -> dict[str, float]:
        """The learner has taken a step on these groups; returns the rollout axis' own metrics.

        Counts of groups are since the run, or its last resume, began.
        """
        self._ledger.trained(step, receipts)
        state = {
            "groups/dispatched": float(self.counts.groups_dispatched),
            "groups/filtered": float(self.counts.groups_filtered),
            "groups/abandoned": float(self.counts.groups_abandoned),
        }
        if self._rollout.guidance.ratio > 0:
            self.guidance.observe(step, metrics["reward/accuracy"])
            state["guidance/length"] = float(self.guidance.length)
        return state

    def save(self, step: int) -> dict[str, object]:
        """State for the checkpoint of `step`. Prompts and groups are in the ledger."""
        self._ledger.cut(step)
        return {"guidance": self.guidance.state_dict()}

    async def resume(self, step: int, state: dict[str, Any]) -> tuple[int, int]:
        """Go on at the checkpoint of `step`; call it before `run`.

        Groups that were verified and not trained on come back from the trajectory log, unless
        the bound or a changed configuration forbids it. Those with a token of a version behind
        the checkpoint do not: that version is lost with the steps that made it. The tickets of all
        others are served again.

        Args:
            state: what `save` returned; empty at step 0.

        Returns:
            (groups taken from the log, tickets to be served again).
        """
        if state:
            self.guidance.load_state_dict(state["guidance"], step)
        opened = {group.group_id: group for group in self._ledger.roll_back(step)}
        logged = await self._log.recover(list(opened))
        of_now = [
            receipt
            for receipt in logged
            if max(receipt.max_version, receipt.dispatch_version) <= step
            and receipt.num_completions == self._group_size
            and not self._is_filtered(receipt)
        ]
        kept = in_time(of_now, step, self._max_staleness, self._groups_per_step)
        for receipt in kept:
            self._budget.try_acquire()
            self._window.dispatch(receipt.group_id, receipt.dispatch_version)
            self._complete(receipt)
            self._ledger.verified(receipt.group_id, receipt.num_tokens)
        self._close_lost(opened, logged, kept, of_now)
        self._source.seek(*self._ledger.cursor())
        return len(kept), len(opened) - len(kept)

    def _close_lost(
        self,
        opened: dict[int, OpenGroup],
        logged: list[GroupReceipt],
        kept: list[GroupReceipt],
        of_now: list[GroupReceipt],
    ) -> None:
        """Those not kept: `stale` where only the bound forbids it, else `abandoned`."""
        tokens = {receipt.group_id: receipt.num_tokens for receipt in logged}
        too_old = {receipt.group_id for receipt in of_now}
        for group_id in opened.keys() - {receipt.group_id for receipt in kept}:
            outcome: Outcome = "stale" if group_id in too_old else "abandoned"
            if group_id in tokens:
                self._ledger.verified(group_id, tokens[group_id])
            part = (opened[group_id].completions, tokens.get(group_id, 0))
            self._ledger.close_group(
                group_id, {outcome: part}, again=True, reason="not there after a resume"
            )

    def status(self) -> str:
        """One line for the display."""
        return (
            f"{self._window.num_dispatched} groups under way, {self._window.num_complete} ready, "
            f"{self._budget.in_use}/{self._budget.capacity} slots"
        )
