"""A run from configuration to result: connect, place actors, train, end everything.

`train` is the Python call behind `grpo-lambda train`. The coordinator is this process: it starts
the actors, runs the generation loop and the learner's loop side by side, and whatever ends first
ends the run. Only the learner's loop may end without an error.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from ray.exceptions import RayError

from actors.evaluate import Evaluator
from actors.guidance import Guidance
from actors.pools import GeneratorPool, VerifierPool
from actors.prompts import PromptSource, build_prompt_source
from actors.rollout import RolloutLoop
from common.config import Config
from common.errors import RunError, UserError
from common.metrics import JsonlSink, Metrics, TensorBoardSink
from common.waits import Waits
from deploy.cluster import Actors, connect, disconnect, start_actors
from deploy.cpu_runtime import preload_libraries
from deploy.display import Display, make_display
from deploy.memory import check_memory
from deploy.models import resolve_model
from deploy.placement import CorePlan, available_cores, plan_cores, uses_cuda
from deploy.run_dir import RunDirectory, last_errors
from learner.group import LearnerGroup
from learner.loop import LearnerLoop, Schedule
from learner.publish import Canary, Publisher

SHUTDOWN_S = 30.0


def train(config: Config) -> dict[str, float]:
    """Run to the end; returns the last step's metrics.

    Raises:
        UserError: wrong input. RunError: the run cannot go on; its cause is the message.
        KeyboardInterrupt: after everything was ended and the run directory closed.
    """
    run = RunDirectory.reopen(config.resume) if config.resume else RunDirectory.create(config)
    try:
        return asyncio.run(Run(config, run).main())
    except RayError as error:
        raise RunError(_explained(error, run)) from error
    except (UserError, RunError) as error:
        if type(error) in (UserError, RunError) and (run.path / "log").is_dir():
            raise type(error)(_explained(error, run)) from error
        raise
    finally:
        run.release()


def _explained(error: Exception, run: RunDirectory) -> str:
    """The error, and what the processes themselves said last."""
    cause = getattr(error, "cause", None) or error
    said = last_errors(run.path / "log")
    lines = [f"{cause}", *(f"  {line}" for line in said), f"Logs of all processes: {run.path}/log"]
    return "\n".join(lines)


class Run:
    """One run of one process. `main` is its life."""

    def __init__(self, config: Config, run: RunDirectory) -> None:
        self._config = config
        self._run = run
        self._waits = Waits()
        self._rollout: RolloutLoop | None = None
        self._display: Display = make_display(config.steps, self._waits, self._status)
        self._first_step = 0

    async def main(self) -> dict[str, float]:
        """Start, train, end. Everything that was started is ended however this returns."""
        stop_on_sigterm(asyncio.current_task())
        with self._display:
            self._display.event(f"run directory {self._run.path}")
            folder = self._model_folder()
            source = self._prompt_source(folder)
            config, cores, cuda = self._place(folder)
            actors = None
            try:
                connect(config, cores)
                actors = start_actors(config, cores, cuda, self._run.path, self._first_step)
                return await self._train(actors, source)
            except ExceptionGroup as group:
                raise first_cause(group) from group
            finally:
                if actors is not None:
                    await end_actors(actors, self._waits)
                disconnect(self._run.path / "log")

    def _model_folder(self) -> str:
        """The model's folder, or on resume the newest checkpoint."""
        if not self._config.resume:
            self._display.event(f"model {self._config.model.path}")
            return str(resolve_model(self._config.model.path))
        steps = self._run.checkpoints()
        if not steps:
            raise UserError(
                f"{self._run.path} has no checkpoint to resume from: start anew with another name="
            )
        self._first_step = steps[-1]
        if self._first_step >= self._config.steps:
            raise UserError(
                f"{self._run.path} is at step {self._first_step} and steps={self._config.steps}: "
                f"give a larger steps= to go on"
            )
        self._display.event(f"resuming from step {self._first_step}")
        return str(self._run.checkpoint(self._first_step))

    def _prompt_source(self, folder: str) -> PromptSource:
        from transformers import AutoTokenizer

        config = self._config
        tokenizer = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=config.model.trust_remote_code
        )
        return build_prompt_source(
            config.data,
            config.eval.prompts,
            config.seed,
            tokenizer,
            config.model.max_length - config.generator.max_completion_tokens,
        )

    def _place(self, folder: str) -> tuple[Config, CorePlan, bool]:
        """The configuration with a local model folder, cores, and whether there is CUDA."""
        config = replace(self._config, model=replace(self._config.model, path=folder))
        cuda = uses_cuda(config)
        if config.weights.transport != "object_store" and not cuda:
            raise UserError(
                f"weights.transport={config.weights.transport} moves weights between CUDA devices "
                "and there is none: use weights.transport=object_store"
            )
        preload = [] if cuda else preload_libraries()
        if not cuda and config.ray.address == "local":
            check_memory(config, Path(folder))
        cores = plan_cores(config, available_cores(), preload)
        self._display.event(
            f"starting {config.generator.count} generator(s) of {cores.generator_threads} "
            f"thread(s), {config.learner.ranks} learner rank(s) of {cores.learner_threads} "
            f"thread(s), {config.verifier.workers} verifier(s) ({cores.reason})"
        )
        return config, cores, cuda

    async def _train(self, actors: Actors, source: PromptSource) -> dict[str, float]:
        config, waits = self._config, self._waits
        generators = GeneratorPool(actors.generators, waits, self._first_step)
        verifiers = VerifierPool(actors.verifiers, waits)
        learner = LearnerGroup(actors.learners, waits, config.learner.step_timeout_s)
        await asyncio.gather(
            generators.call_all(
                "start", owner="start-up", deadline_s=config.generator.start_timeout_s
            ),
            verifiers.call_all(
                "warm_up", owner="start-up", deadline_s=config.generator.start_timeout_s
            ),
            learner.setup(config.learner.start_timeout_s),
        )
        guidance = Guidance(config.algorithm.rollout.guidance, config.steps)
        first_group_id = await self._restore(learner, source, guidance)
        if config.weights.transport != "object_store":
            await learner.open_transport(
                config.weights.transport,
                list(actors.generators.values()),
                config.generator.tensor_parallel,
                config.weights.publish_timeout_s,
            )
        self._display.event("all parts are up")
        self._rollout = self._rollout_loop(
            actors, source, generators, verifiers, guidance, first_group_id
        )
        evaluator = self._evaluator(actors, source, generators, verifiers)
        publisher = self._publisher(learner, generators, source)
        metrics = self._metrics()
        loop = LearnerLoop(
            learner=learner,
            publisher=publisher,
            groups=self._rollout,
            evaluation=evaluator,
            save=self._saver(learner),
            record=self._recorder(metrics),
            schedule=self._schedule(),
        )
        try:
            return await until_learner_ends(loop.run(), self._rollout.run())
        finally:
            metrics.close()

    async def _restore(
        self, learner: LearnerGroup, source: PromptSource, guidance: Guidance
    ) -> int:
        """Load learner and prompt cursor on resume; returns the first group id."""
        if self._first_step == 0:
            return 0
        folder = str(self._run.checkpoint(self._first_step))
        extra = await learner.load_checkpoint(folder, self._config.checkpoint.timeout_s)
        source.load_state_dict(extra["prompts"])
        guidance.load_state_dict(extra["guidance"])
        return int(extra["next_group_id"])

    def _rollout_loop(
        self,
        actors: Actors,
        source: PromptSource,
        generators: GeneratorPool,
        verifiers: VerifierPool,
        guidance: Guidance,
        first_group_id: int,
    ) -> RolloutLoop:
        config = self._config
        rules = len(config.verifier.rules)
        return RolloutLoop(
            source=source,
            generators=generators,
            verifiers=verifiers,
            stream=actors.stream,
            batch=config.batch,
            generator=config.generator,
            rollout=config.algorithm.rollout,
            guidance=guidance,
            encode=source.encode,
            # Groups queue for a verifier: all of the budget may stand before this one.
            verify_timeout_s=60.0
            + config.verifier.timeout_s
            * config.batch.group_size
            * rules
            * config.max_groups_in_flight,
            first_group_id=first_group_id,
            waits=self._waits,
        )

    def _evaluator(
        self,
        actors: Actors,
        source: PromptSource,
        generators: GeneratorPool,
        verifiers: VerifierPool,
    ) -> Evaluator:
        return Evaluator(
            prompts=source.eval_prompts(self._config.eval.prompts),
            generators=generators,
            verifiers=verifiers,
            stream=actors.stream,
            config=self._config.eval,
            max_tokens=self._config.generator.max_completion_tokens,
            waits=self._waits,
        )

    def _publisher(
        self, learner: LearnerGroup, generators: GeneratorPool, source: PromptSource
    ) -> Publisher:
        weights = self._config.weights
        prompts = source.eval_prompts(self._config.eval.prompts)[: weights.canary_sequences]
        canary = Canary.from_prompts(
            [prompt.token_ids for prompt in prompts], weights.canary_tokens
        )
        return Publisher(
            learner,
            generators,
            canary,
            self._config.canary_tolerance,
            weights.publish_timeout_s,
            on_device=weights.transport != "object_store",
        )

    def _metrics(self) -> Metrics:
        last_step = self._first_step if self._first_step else None
        return Metrics(
            [
                JsonlSink(self._run.path / "metrics.jsonl", last_step),
                TensorBoardSink(self._run.path / "tensorboard", last_step),
            ]
        )

    def _recorder(self, metrics: Metrics) -> Callable[[int, dict[str, float]], None]:
        def record(step: int, values: dict[str, float]) -> None:
            metrics.write(step, values)
            self._display.step(step, values)

        return record

    def _saver(self, learner: LearnerGroup) -> Callable[[int], Any]:
        async def save(step: int) -> None:
            assert self._rollout is not None
            folder = self._run.checkpoint(step)
            folder.parent.mkdir(exist_ok=True)
            await learner.save_checkpoint(
                str(folder), self._rollout.state_dict(), self._config.checkpoint.timeout_s
            )
            self._run.prune_checkpoints(self._config.checkpoint.keep_last)
            self._display.event(f"checkpoint {folder}")

        return save

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
        return self._rollout.status() if self._rollout else "starting"


async def until_learner_ends(learner: Any, generation: Any) -> dict[str, float]:
    """Run both loops; the learner's result, or the error of whichever ended first."""
    tasks = [asyncio.create_task(learner), asyncio.create_task(generation)]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if tasks[1].done():
            await tasks[1]
            raise RunError("the generation loop returned, which it never should")
        result: dict[str, float] = await tasks[0]
        return result
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def end_actors(actors: Actors, waits: Waits) -> None:
    """Ask every actor to end its own children; whatever does not answer is killed after."""
    calls = [
        *[handle.shutdown.remote() for handle in actors.generators.values()],
        *[handle.close.remote() for handle in actors.verifiers.values()],
        *[handle.shutdown.remote() for handle in actors.learners],
        actors.stream.close.remote(),
    ]
    waiting = [
        waits.on(call, owner="shutdown", cause="an actor", deadline_s=SHUTDOWN_S) for call in calls
    ]
    # A dead or hanging actor is why we may be here: `disconnect` kills what is left.
    await asyncio.gather(*waiting, return_exceptions=True)


def first_cause(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first error inside nested groups."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def stop_on_sigterm(task: asyncio.Task[Any] | None) -> None:
    """SIGTERM ends the run as Ctrl-C does."""
    if task is not None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel, "SIGTERM")
