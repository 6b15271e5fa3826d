"""One run: its parts made and connected, its loops side by side until the learner is done.

The coordinator is this process. Only the learner's loop may end without an error; whatever ends
first ends the run.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.ipc

from actors.data.prompts import PromptSource, build_prompt_source
from actors.rollout.episodes import Episodes, GroupSampling
from actors.rollout.evaluate import Evaluator
from actors.rollout.group_book import GroupBook
from actors.rollout.guidance import Guidance
from actors.rollout.loop import RolloutLoop
from actors.rollout.pools import GeneratorPool, VerifierPool
from actors.rollout.resume import RolloutState
from common.config.notes import notes
from common.config.sections import Config
from common.errors import UserError
from common.record.credit_log import forget_credit_after
from common.record.ledger import Ledger
from common.record.metrics import Metrics
from common.record.writer import TrajectoryLogClient
from common.supervision.calls import get_all
from common.supervision.heartbeat import beat
from common.supervision.loops import first_cause, until_it_ends
from common.trajectory import GroupReceipt, batch_refs
from common.weights.transport import Receivers
from deploy.models.resolve import ModelLocation, check_vocabulary, resolve_model
from deploy.placement.options import with_compute_dtype
from deploy.placement.reservation import fewest_generators, generator_names
from deploy.run.actors import Actors, start_log
from deploy.run.checkpoints import Checkpoints
from deploy.run.directory import FAILED_BATCH, LEDGER, QUARANTINE, RunDirectory
from deploy.run.display import Display, make_display
from deploy.run.metric_sinks import open_metrics
from deploy.run.mirror import Mirror
from deploy.run.preemption import Preemption
from deploy.run.replacements import Replacements
from deploy.run.restart_budget import RestartBudget
from deploy.run.service import Service
from learner.loop import LearnerLoop, Schedule
from learner.training.guards import check_logprob_gap
from learner.training.ranks import LearnerRanks
from learner.weights.publish import Canary, Publisher

_FETCH_S = 60.0


class Run:
    """One run in its directory. `main` is its life."""

    def __init__(
        self,
        config: Config,
        run: RunDirectory,
        service: Service,
        preemption: Preemption,
        restarts: RestartBudget,
    ) -> None:
        self._config = config
        self._restarts = restarts
        self._preemption = preemption
        self._run = run
        self._service = service
        self._waits = service.waits
        place = config.checkpoint.mirror
        self._mirror = Mirror(place) if place is not None else None
        if self._mirror is not None:
            self._mirror.check_apart(run.path)
        self._book: GroupBook | None = None
        self._display: Display = make_display(config.steps, self._waits, self._status)
        self._first_step = 0

    async def main(self) -> dict[str, float]:
        """Start what is missing, train, end what is this run's own."""
        with self._display:
            self._display.event(f"run directory {self._run.path}")
            for note in notes(self._config):
                self._display.event(note)
            folder = self._model_folder()
            origin = self._origin(folder)
            source = self._prompt_source(folder)
            config = with_compute_dtype(self._config)
            self._config = replace(config, model=replace(config.model, path=folder))
            actors, used = await self._service.open(
                self._config, self._first_step, origin, self._display.event
            )
            self._preemption.listen()
            writer = start_log(self._config, self._run.path)
            timeout_s = self._config.verify_timeout_s
            log = TrajectoryLogClient(writer, self._waits, timeout_s, self._replacements.log())
            try:
                return await self._train(actors, log, source, used)
            except ExceptionGroup as group:
                raise first_cause(group) from group
            finally:
                await self._service.end_run(log.writer)

    @property
    def _replacements(self) -> Replacements:
        return Replacements(self._service.factory, self._run, self._restarts, self._display.event)

    def _model_folder(self) -> str:
        """The model's folder, or on resume the newest checkpoint if there is one."""
        if self._config.resume:
            self._first_step = self._run.newest_checkpoint(self._display.event)
        if not self._first_step:
            self._display.event(f"model {self._config.model.path}, from step 0")
            return str(resolve_model(self._config.model.path))
        if self._first_step >= self._config.steps:
            raise UserError(
                f"{self._run.path} is at step {self._first_step} and steps={self._config.steps}: "
                f"give a larger steps= to go on"
            )
        self._display.event(f"resuming from step {self._first_step}")
        return str(self._run.checkpoint(self._first_step))

    def _origin(self, folder: str) -> ModelLocation:
        """The model before step 1: after a resume it is still the reference policy."""
        name = self._config.model.path
        if not self._first_step:
            return ModelLocation(name, folder)
        needed = self._config.algorithm.objective.kl > 0
        return ModelLocation(name, str(resolve_model(name)) if needed else None)

    def _prompt_source(self, folder: str) -> PromptSource:
        from transformers import AutoTokenizer

        config = self._config
        tokenizer = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=config.model.trust_remote_code
        )
        check_vocabulary(tokenizer.get_vocab().values(), Path(folder))
        source = build_prompt_source(
            config.data,
            config.eval.prompts,
            config.seed,
            tokenizer,
            config.model.max_length - config.generator.max_completion_tokens,
            config.verifier.rules,
        )
        if bad := source.quarantine.rows:
            path = self._run.path / QUARANTINE
            source.quarantine.write(path)
            self._display.event(
                f"{len(bad)} of {source.quarantine.seen} rows cannot be used, the first because "
                f"{bad[0].reason}; all are in {path}"
            )
        return source

    async def _train(
        self, actors: Actors, log: TrajectoryLogClient, source: PromptSource, used: bool
    ) -> dict[str, float]:
        """`used`: the generators hold the weights of a run before this one."""
        config = self._config
        fewest = fewest_generators(config)
        generators = GeneratorPool(actors.generators, self._waits, self._first_step, fewest)
        verifiers = VerifierPool(actors.verifiers, self._waits)
        learner = LearnerRanks(
            actors.learners,
            self._waits,
            config.learner.step_timeout_s,
            str(self._run.path),
            config.learner.credit_log_every,
        )
        await self._start(generators, verifiers, learner, used)
        generators.replacement = self._replacements.generators()
        verifiers.replacement = self._replacements.verifiers()
        ledger = Ledger(self._run.path / LEDGER, source.identity)
        room = config.generator.max_completion_tokens - 1
        self._book = GroupBook(
            ledger,
            self._waits,
            max_staleness=config.generator.max_staleness,
            groups_per_step=config.groups_per_step,
            dynamic_sampling=config.algorithm.rollout.dynamic_sampling,
            # On one node they are in the learner's reach as soon as they are in the store.
            announce=None if config.ray.address == "local" else learner.fetch_ahead,
        )
        guidance = Guidance(config.algorithm.rollout.guidance, config.steps, room)
        rollout = RolloutState(source, self._book, guidance, log, config.batch.group_size)
        try:
            await self._restore(learner, rollout)
            publisher = await self._publisher(learner, generators, source)
            generators.proof = publisher.prove_newcomer
            generators.expect(set(generator_names(config)) - set(actors.generators))
            if used:
                await publisher.deliver(await publisher.export(self._first_step))
            self._display.event("all parts are up")
            return await self._loops(learner, publisher, rollout, generators, verifiers)
        finally:
            generators.end()
            verifiers.end()
            ledger.end()

    async def _loops(
        self,
        learner: LearnerRanks,
        publisher: Publisher,
        rollout: RolloutState,
        generators: GeneratorPool,
        verifiers: VerifierPool,
    ) -> dict[str, float]:
        """The two loops, until the learner's ends."""
        config = self._config
        metrics = self._metrics()
        loop = LearnerLoop(
            learner=learner,
            publisher=publisher,
            groups=rollout.book,
            adapt=rollout.guidance.after_step,
            evaluation=self._evaluator(rollout, generators, verifiers),
            checkpoints=Checkpoints(
                config.checkpoint,
                self._run,
                learner,
                rollout.save,
                self._display.event,
                self._waits,
                self._mirror,
            ),
            record=self._recorder(metrics),
            schedule=self._schedule(),
            keep_batch=self._keep_batch,
            stop=self._preemption.requested,
        )
        with metrics, self._preemption.between_steps():
            return await until_it_ends(
                loop.run(),
                self._generation(rollout, generators, verifiers).run(),
                self._heartbeat(generators, verifiers, learner, rollout.log),
            )

    def _generation(
        self, rollout: RolloutState, generators: GeneratorPool, verifiers: VerifierPool
    ) -> RolloutLoop:
        config = self._config
        return RolloutLoop(
            source=rollout.source,
            episodes=Episodes(
                generators,
                verifiers,
                sample_timeout_s=config.generator.group_timeout_s,
                judge_timeout_s=config.verify_timeout_s,
            ),
            book=rollout.book,
            log=rollout.log,
            guidance=rollout.guidance,
            sampling=GroupSampling(
                config.batch.group_size,
                config.generator.max_completion_tokens,
                config.generator.temperature,
                config.generator.group_cap_s,
            ),
            seed=config.seed if config.generator.max_staleness == 0 else None,
        )

    def _evaluator(
        self, rollout: RolloutState, generators: GeneratorPool, verifiers: VerifierPool
    ) -> Evaluator:
        held_out, timeout_s = self._config.eval, self._config.eval.timeout_s
        return Evaluator(
            prompts=rollout.source.eval_prompts(held_out.prompts),
            episodes=Episodes(
                generators, verifiers, sample_timeout_s=timeout_s, judge_timeout_s=timeout_s
            ),
            log=rollout.log,
            max_tokens=held_out.max_completion_tokens
            or self._config.generator.max_completion_tokens,
            log_timeout_s=timeout_s,
        )

    async def _start(
        self, generators: GeneratorPool, verifiers: VerifierPool, learner: LearnerRanks, used: bool
    ) -> None:
        config = self._config
        starts: list[Awaitable[Any]] = [learner.setup(config.learner.start_timeout_s)]
        if not used:
            deadline_s = config.generator.start_timeout_s
            starts += [generators.start(deadline_s), verifiers.warm_up(deadline_s)]
        await asyncio.gather(*starts)

    async def _restore(self, learner: LearnerRanks, rollout: RolloutState) -> None:
        """On resume: the learner, the groups not yet trained on, the cursor of the prompts.

        Step 0 is a checkpoint too, that of the untrained model.
        """
        if not self._config.resume:
            rollout.save(0)
            return
        state = {}
        if self._first_step:
            folder = str(self._run.checkpoint(self._first_step))
            state = await learner.load_checkpoint(folder, self._config.checkpoint.timeout_s)
        forget_credit_after(self._run.path, self._first_step)
        kept, again = await rollout.resume(self._first_step, state)
        self._display.event(
            f"{kept} verified group(s) taken from the trajectory log, {again} to be sampled again"
        )

    async def _publisher(
        self, learner: LearnerRanks, generators: GeneratorPool, source: PromptSource
    ) -> Publisher:
        weights = self._config.weights
        receivers = Receivers(
            list(generators.handles.values()),
            self._config.generator.devices,
            weights.publish_timeout_s,
        )
        await learner.open_transport(receivers, weights.publish_timeout_s)
        prompts = source.some_prompts(weights.canary_sequences)
        canary = Canary.from_prompts(
            [prompt.token_ids for prompt in prompts], weights.canary_tokens
        )
        return Publisher(
            learner,
            generators,
            self._config.transport,
            canary,
            self._config.canary_tolerance,
            weights.publish_timeout_s,
            weights.resends,
        )

    def _heartbeat(self, *parts: Any) -> Coroutine[Any, Any, None]:
        restart = self._config.restart
        asks = [partial(part.ping, restart.silence_s) for part in parts]
        return beat(restart.heartbeat_s, asks)

    def _keep_batch(self, receipts: list[GroupReceipt]) -> None:
        batches = get_all(batch_refs(receipts), _FETCH_S)
        with pa.ipc.new_file(self._run.path / FAILED_BATCH, batches[0].schema) as file:
            for batch in batches:
                file.write_batch(batch)

    def _metrics(self) -> Metrics:
        last_step = None
        if self._config.resume:
            last_step = self._first_step or -1  # step 0 is evaluated again
        return open_metrics(self._config, self._run.path, last_step, self._display.event)

    def _recorder(self, metrics: Metrics) -> Callable[[int, dict[str, float]], None]:
        def record(step: int, values: dict[str, float]) -> None:
            metrics.write(step, values)
            self._display.step(step, values)
            if "logprob_gap/mean" in values and not values["steps/skipped"]:
                gap = values["logprob_gap/mean"]
                check_logprob_gap(gap, step, self._config.learner, self._display.event)

        return record

    def _schedule(self) -> Schedule:
        config = self._config
        return Schedule(
            first_step=self._first_step,
            last_step=config.steps,
            eval_every=config.eval.every,
            checkpoint_every=config.checkpoint.every,
            max_staleness=config.generator.max_staleness,
            take_timeout_s=2 * config.generator.group_timeout_s,
        )

    def _status(self) -> str:
        return self._book.status() if self._book else "starting"
