"""The parts of one run, made and connected: each is finished when it is made.

    members   generators, verifiers and learner are up
    learner   -> proof of the weights -> pools, which prove whoever joins them
    ledger    -> book of groups -> what a checkpoint keeps, put back where the run goes on
    publisher from the learner to the pools

Parts are made in the order in which they need each other.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

from actors.rollout.group_book import GroupBook
from actors.rollout.guidance import Guidance
from actors.rollout.pools import (
    GeneratorPool,
    VerifierPool,
    start_generators,
    warm_up_verifiers,
)
from actors.rollout.resume import RolloutState
from actors.rollout.teacher import TeacherPool
from common.record.credit_log import forget_credit_after
from common.record.ledger import Ledger
from common.record.writer import TrajectoryLogClient
from common.supervision.waits import Waits
from common.weights.transport import Receivers
from deploy.placement.reservation import fewest_generators, generator_names
from deploy.placement.walls import walls_there
from deploy.run import shared_devices
from deploy.run.actors import Actors
from deploy.run.directory import LEDGER, RunDirectory
from deploy.run.inputs import Inputs, Notify
from deploy.run.replacements import Replacements
from deploy.run.start_times import StartTimes
from learner.training.ranks import LearnerRanks
from learner.weights.canary import Canary, CanaryProof
from learner.weights.publish import Publisher


@dataclass(frozen=True)
class Parts:
    """What the loops of a run work with."""

    generators: GeneratorPool
    verifiers: VerifierPool
    learner: LearnerRanks
    log: TrajectoryLogClient
    rollout: RolloutState
    publisher: Publisher
    teachers: TeacherPool | None
    """None where there are none."""


class Assembly:
    """Makes the parts of one run from the actors that it was given."""

    def __init__(
        self,
        inputs: Inputs,
        run: RunDirectory,
        actors: Actors,
        log: TrajectoryLogClient,
        replacements: Replacements,
        waits: Waits,
        notify: Notify,
        times: StartTimes,
    ) -> None:
        self._inputs, self._config = inputs, inputs.config
        self._run = run
        self._actors = actors
        self._log = log
        self._replacements = replacements
        self._waits = waits
        self._notify = notify
        self._times = times

    @asynccontextmanager
    async def parts(self, *, used: bool) -> AsyncIterator[Parts]:
        """The parts, until the run ends: then nobody joins any more, and the ledger is closed.

        Args:
            used: the generators hold the weights of a run before this one.
        """
        learner = self._learner()
        reach = await self._members_up(learner, used)
        proof = self._proof(learner, reach)
        async with self._generators(proof) as generators, self._verifiers() as verifiers:
            with ExitStack() as at_end:
                ledger = Ledger(self._run.path / LEDGER, self._inputs.source.identity)
                at_end.callback(ledger.end)
                rollout = self._rollout(ledger, learner)
                await self._restore(learner, rollout)
                publisher = await self._publisher(learner, generators, proof)
                with self._times.part("time/start/weights"):
                    await publisher.begin(self._inputs.first_step, loaded=self._loaded(used))
                teachers = self._teachers()
                yield Parts(generators, verifiers, learner, self._log, rollout, publisher, teachers)

    def _loaded(self, used: bool) -> bool:
        """Whether the generators have read the weights with which the run begins."""
        if used or self._config.transport.shares_devices:
            return False  # those that sleep have given their weights away
        # Adapters that are 0 change nothing; those of a checkpoint are still to come.
        return self._config.served_adapter is None or self._inputs.first_step == 0

    def _learner(self) -> LearnerRanks:
        learner = self._config.learner
        return LearnerRanks(
            self._actors.learners,
            self._waits,
            learner.step_timeout_s,
            str(self._run.path),
            learner.credit_log_every,
        )

    async def _members_up(self, learner: LearnerRanks, used: bool) -> int:
        """Returns when all serve; the range behind which the model computes otherwise."""
        starts: list[Awaitable[Any]] = [self._take_devices(learner, used)]
        if not used:
            deadline_s = self._config.generator.start_timeout_s
            starts.append(self._verifiers_up(deadline_s))
            starts.append(start_generators(self._actors.teachers, self._waits, deadline_s))
        facts, *_ = await asyncio.gather(*starts)
        return int(facts["reach"])

    async def _verifiers_up(self, deadline_s: float) -> None:
        """They can judge; those on other machines say what walls stand there."""
        with self._times.part("time/start/verifiers"):
            found = await warm_up_verifiers(self._actors.verifiers, self._waits, deadline_s)
        if self._config.ray.address != "local":  # else it was said before anything started
            for line in walls_there(found):
                self._notify(line)

    async def _set_up(self, learner: LearnerRanks) -> dict[str, Any]:
        """Set the learner up, and say how it computes."""
        with self._times.part("time/start/learner"):
            facts = await learner.setup(self._config.learner.start_timeout_s)
        for note in facts["notes"]:
            self._notify(note)
        return facts

    async def _take_devices(self, learner: LearnerRanks, used: bool) -> dict[str, Any]:
        """Start generators and learner side by side, or on the same devices one by one.

        Returns facts of the learner.
        """
        config, generators, waits = self._config, self._actors.generators, self._waits
        deadline_s = config.generator.start_timeout_s
        if config.transport.shares_devices:
            if used:
                await shared_devices.sleep(generators, waits, deadline_s)
            else:
                with self._times.part("time/start/generators"):
                    await shared_devices.start_asleep(config, generators, waits, self._notify)
            return await self._set_up(learner)
        if used:
            return await self._set_up(learner)
        facts, _ = await asyncio.gather(self._set_up(learner), self._generators_up(deadline_s))
        return facts

    async def _generators_up(self, deadline_s: float) -> None:
        with self._times.part("time/start/generators"):
            await start_generators(self._actors.generators, self._waits, deadline_s)

    def _proof(self, learner: LearnerRanks, reach: int) -> CanaryProof:
        weights = self._config.weights
        prompts = self._inputs.source.some_prompts(weights.canary_sequences)
        canary = Canary.from_prompts(
            [prompt.token_ids for prompt in prompts],
            weights.canary_tokens,
            reach,
            self._config.model.max_length,
        )
        tolerance = self._config.canary_tolerance
        return CanaryProof(learner, canary, tolerance, weights.canary_growth)

    def _generators(self, proof: CanaryProof) -> GeneratorPool:
        handles = self._actors.generators
        return GeneratorPool(
            handles,
            self._waits,
            self._inputs.first_step,
            self._replacements.generators(),
            proof=proof.prove_newcomer,
            min_live=fewest_generators(self._config),
            to_come=set(generator_names(self._config)) - set(handles),
        )

    def _teachers(self) -> TeacherPool | None:
        handles = dict(self._actors.teachers)
        return TeacherPool(handles, self._waits) if handles else None

    def _verifiers(self) -> VerifierPool:
        return VerifierPool(self._actors.verifiers, self._waits, self._replacements.verifiers())

    def _rollout(self, ledger: Ledger, learner: LearnerRanks) -> RolloutState:
        config, axis = self._config, self._config.algorithm.rollout
        book = GroupBook(
            ledger,
            self._waits,
            max_staleness=config.generator.max_staleness,
            groups_per_step=config.groups_per_step,
            dynamic_sampling=axis.dynamic_sampling,
            # On one node they are in the learner's reach as soon as they are in the store.
            announce=None if config.ray.address == "local" else learner.fetch_ahead,
        )
        room = config.generator.max_completion_tokens - 1
        guidance = Guidance(axis.guidance, config.steps, room)
        return RolloutState(
            self._inputs.source,
            book,
            guidance,
            self._log,
            config.batch.group_size,
            config.algorithm.rollout.follow_up,
        )

    async def _restore(self, learner: LearnerRanks, rollout: RolloutState) -> None:
        """On resume: the learner, the groups not yet trained on, the cursor of the prompts.

        Step 0 is a checkpoint too, that of the untrained model.
        """
        step = self._inputs.first_step
        if not self._config.resume:
            rollout.save(0)
            return
        state = {}
        if step:
            folder = str(self._run.checkpoint(step))
            state = await learner.load_checkpoint(folder, self._config.checkpoint.timeout_s)
        forget_credit_after(self._run.path, step)
        kept, again = await rollout.resume(step, state)
        self._notify(
            f"{kept} verified group(s) taken from the trajectory log, {again} to be sampled again"
        )

    async def _publisher(
        self, learner: LearnerRanks, generators: GeneratorPool, proof: CanaryProof
    ) -> Publisher:
        weights = self._config.weights
        receivers = Receivers(
            list(generators.handles.values()),
            self._config.generator.devices,
            weights.publish_timeout_s,
        )
        await learner.open_transport(receivers, weights.publish_timeout_s)
        return Publisher(
            learner,
            generators,
            self._config.transport,
            proof,
            weights.publish_timeout_s,
            weights.resends,
        )
