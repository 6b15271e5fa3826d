"""One run: its parts made and connected, its loops side by side until the learner is done.

The coordinator is this process. Only the learner's loop may end without an error; whatever ends
first ends the run.
"""

from __future__ import annotations

from collections.abc import Coroutine
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.ipc

from actors.rollout.episodes import Episodes, GroupSampling
from actors.rollout.evaluate import Evaluator
from actors.rollout.loop import RolloutLoop
from common.config.sections import Config
from common.record.metrics import Metrics
from common.record.writer import TrajectoryLogClient
from common.supervision.calls import get_all
from common.supervision.garbage import old_objects_settled
from common.supervision.heartbeat import beat
from common.supervision.loops import first_cause, until_it_ends
from common.trajectory import GroupReceipt, batch_refs
from deploy.predict.notes import notes
from deploy.run.actors import Actors, learner_job, start_log
from deploy.run.assembly import Assembly, Parts
from deploy.run.checkpoints import Checkpoints
from deploy.run.directory import FAILED_BATCH, RunDirectory
from deploy.run.display import make_display
from deploy.run.inputs import Inputs, find_inputs
from deploy.run.metric_sinks import open_metrics
from deploy.run.mirror import Mirror
from deploy.run.preemption import Preemption
from deploy.run.replacements import Replacements
from deploy.run.restart_budget import RestartBudget
from deploy.run.service import Service
from deploy.run.start_times import StartTimes
from learner.loop import LearnerLoop, Record, Schedule
from learner.training.guards import check_logprob_gap

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
        self._run = run
        self._service = service
        self._preemption = preemption
        self._restarts = restarts
        self._display = make_display(config.steps, service.waits)
        self._notify = self._display.event
        self._times = StartTimes()
        place = config.checkpoint.mirror
        self._mirror = Mirror(place) if place is not None else None
        if self._mirror is not None:
            self._mirror.check_apart(run.path)

    async def main(self) -> dict[str, float]:
        """Find what the run begins from, start what is missing, train; the last step's metrics."""
        if self._service.is_new:
            self._times.process()
        with self._display:
            self._notify(f"run directory {self._run.path}")
            for note in notes(self._config):
                self._notify(note)
            with self._times.part("time/start/inputs"):
                inputs = find_inputs(self._config, self._run, self._notify)
            job = learner_job(inputs.config, inputs.origin)
            with self._times.part("time/start/ray"):
                actors, used = await self._service.open(
                    inputs.config, job, inputs.first_step, inputs.origin, self._notify
                )
            self._preemption.listen()
            try:
                return await self._train(inputs, actors, used)
            except ExceptionGroup as group:
                raise first_cause(group) from group

    async def _train(self, inputs: Inputs, actors: Actors, used: bool) -> dict[str, float]:
        """Connect the parts and run the loops; what is this run's own is ended after it.

        Args:
            used: the generators hold the weights of a run before this one.
        """
        waits, config = self._service.waits, inputs.config
        replacements = Replacements(self._service.factory, self._run, self._restarts, self._notify)
        writer = start_log(config.verifier, self._run.path)
        log = TrajectoryLogClient(writer, waits, config.verify_timeout_s, replacements.log())
        assembly = Assembly(
            inputs, self._run, actors, log, replacements, waits, self._notify, self._times
        )
        try:
            async with assembly.parts(used=used) as parts:
                self._notify("all parts are up")
                self._display.follow(parts.rollout.book.status)
                return await self._loops(inputs, parts)
        finally:
            await self._service.end_run(log.writer)

    async def _loops(self, inputs: Inputs, parts: Parts) -> dict[str, float]:
        """The two loops and the heartbeat, until the learner's ends."""
        config = inputs.config
        with self._metrics(inputs) as metrics, self._preemption.between_steps():
            learning = LearnerLoop(
                learner=parts.learner,
                publisher=parts.publisher,
                groups=parts.rollout.book,
                adapt=parts.rollout.guidance.after_step,
                evaluation=held_out_evaluation(config, parts),
                checkpoints=self._checkpoints(config, parts),
                record=self._recorder(metrics),
                schedule=schedule_of(inputs),
                keep_batch=self._keep_batch,
                stop=self._preemption.requested,
                scorer=parts.teachers,
                score_timeout_s=config.teacher.score_timeout_s,
            )
            generation, beating = generation_loop(config, parts).run(), heartbeat(config, parts)
            with old_objects_settled():
                return await until_it_ends(learning.run(), generation, beating)

    def _checkpoints(self, config: Config, parts: Parts) -> Checkpoints:
        return Checkpoints(
            config.checkpoint,
            self._run,
            parts.learner,
            parts.rollout.save,
            self._notify,
            self._service.waits,
            self._mirror,
        )

    def _metrics(self, inputs: Inputs) -> Metrics:
        last_step = None
        if inputs.config.resume:
            last_step = inputs.first_step or -1  # step 0 is evaluated again
        return open_metrics(inputs.config, self._run.path, last_step, self._notify)

    def _recorder(self, metrics: Metrics) -> Record:
        def record(step: int, values: dict[str, float]) -> None:
            values = values | self._times.once()
            metrics.write(step, values)
            self._display.step(step, values)
            if "logprob_gap/mean" in values and not values["steps/skipped"]:
                gap = values["logprob_gap/mean"]
                check_logprob_gap(gap, step, self._config.learner, self._notify)

        return record

    def _keep_batch(self, receipts: list[GroupReceipt]) -> None:
        batches = get_all(batch_refs(receipts), _FETCH_S)
        with pa.ipc.new_file(self._run.path / FAILED_BATCH, batches[0].schema) as file:
            for batch in batches:
                file.write_batch(batch)


def generation_loop(config: Config, parts: Parts) -> RolloutLoop:
    """Prompts to groups, for ever."""
    generator, rollout = config.generator, parts.rollout
    asked = config.algorithm.rollout
    follow_up = None if asked.follow_up.kind == "none" else asked.follow_up
    return RolloutLoop(
        source=rollout.source,
        episodes=Episodes(
            parts.generators,
            parts.verifiers,
            sample_timeout_s=generator.group_timeout_s,
            judge_timeout_s=config.verify_timeout_s,
        ),
        book=rollout.book,
        log=parts.log,
        guidance=rollout.guidance,
        sampling=GroupSampling(
            asked.follow_up.first_of(config.batch.group_size),
            generator.max_completion_tokens,
            generator.temperature,
            generator.group_cap_s,
            asked.greedy,
            asked.consistency.pattern if asked.consistency.weight else "",
            follow_up,
            config.batch.group_size,
        ),
        seed=config.sampling_seed,
        behind=partial(rollout.source.behind, group_size=config.batch.group_size),
    )


def held_out_evaluation(config: Config, parts: Parts) -> Evaluator:
    """The held-out prompts, by the same generators and verifiers."""
    timeout_s = config.eval.timeout_s
    return Evaluator(
        prompts=parts.rollout.source.eval_prompts(config.eval.prompts),
        episodes=Episodes(
            parts.generators,
            parts.verifiers,
            sample_timeout_s=timeout_s,
            judge_timeout_s=timeout_s,
        ),
        log=parts.log,
        max_tokens=config.eval.max_completion_tokens or config.generator.max_completion_tokens,
        log_timeout_s=timeout_s,
    )


def heartbeat(config: Config, parts: Parts) -> Coroutine[Any, Any, None]:
    """Signs of life of every process, for ever."""
    silence_s = config.restart.silence_s
    everyone = (parts.generators, parts.verifiers, parts.learner, parts.log)
    pings = [partial(each.ping, silence_s) for each in everyone]
    teachers = [] if parts.teachers is None else [partial(parts.teachers.ping, silence_s)]
    return beat(config.restart.heartbeat_s, [*pings, *teachers])


def schedule_of(inputs: Inputs) -> Schedule:
    """What happens at which step."""
    config = inputs.config
    parts = 1 if config.algorithm.rollout.follow_up.kind == "none" else 2
    return Schedule(
        first_step=inputs.first_step,
        last_step=config.steps,
        eval_every=config.eval.every,
        checkpoint_every=config.checkpoint.every,
        max_staleness=config.generator.max_staleness,
        take_timeout_s=2 * parts * config.generator.group_timeout_s,
    )
