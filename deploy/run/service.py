"""Ray and the actors: the part of a run that the next run can use again.

Starting vLLM takes most of a short run's time. A comparison of many recipes therefore keeps one
`Service`: each run loads its own learner into the processes that the last run left behind, and
sends its first weights to their generators. These keep the random state of the runs before:
`seed` then decides the prompts and their order, not the samples. An evaluation has no learner, and
verifiers of its own for each suite.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from ray.exceptions import RayTaskError

from actors.environments.actor import EnvironmentActor
from actors.generation.generator import Generator
from actors.verifiers.worker import VerifierWorker
from common.config.quantization import check_device
from common.config.sections import TeacherConfig, VerifierConfig
from common.errors import UserError
from common.record.writer import TrajectoryLogWriter
from common.supervision.calls import Handle, Ref, ask
from common.supervision.waits import Waits
from common.weights.registry import names_where
from deploy.models.resolve import ModelLocation
from deploy.placement.config import ActorConfig, num_ranks
from deploy.placement.cpu_runtime import preload_libraries
from deploy.placement.memory import check_memory
from deploy.placement.options import CorePlan, actor_options, devices_wanted, plan_here, uses_cuda
from deploy.placement.reservation import Reservation, generator_names, wishes
from deploy.placement.walls import environment_walls, walls_here
from deploy.run.actors import ActorFactory, Actors, connect, disconnect
from learner.training.job import LearnerJob
from learner.training.memory import ALONE, OtherModels
from learner.training.rank import LearnerRank
from learner.training.ranks import LearnerRanks

SHUTDOWN_S = 30.0


class Service:
    """Starts with the first run that needs it; `end` ends everything that was started."""

    def __init__(self) -> None:
        self.waits = Waits()
        self._actors: Actors | None = None
        self._served: object = None
        self._factory: ActorFactory | None = None

    @property
    def is_new(self) -> bool:
        """Whether nothing was started yet."""
        return self._factory is None

    @property
    def factory(self) -> ActorFactory:
        """What makes more actors like those that are open."""
        assert self._factory is not None
        return self._factory

    async def open(
        self,
        config: ActorConfig,
        job: LearnerJob | None,
        version: int,
        origin: ModelLocation,
        notify: Callable[[str], None],
    ) -> tuple[Actors, bool]:
        """Actors for `config`, and whether they served another run before.

        Args:
            config: its `model.path` is a local folder with the weights of `version`.
            job: what the learner is to do; None for an evaluation, which has no learner.
            origin: finds the model that the run began from.

        Raises:
            UserError: the configuration cannot run here, or needs other actors than the runs
                before it.
        """
        wanted = _sections(config)
        if self._actors is not None:
            if wanted != self._served:
                raise UserError(
                    "runs that share actors must have the same model, generator, verifier, "
                    "environment, weights.transport, weights.publish and ray sections and as many "
                    "learner ranks (generator.max_staleness may differ)"
                )
            if job is not None:
                learner = LearnerRanks(self._actors.learners, self.waits, SHUTDOWN_S)
                await learner.begin(job, SHUTDOWN_S)
            return self._actors, True
        others = ALONE if job is None else OtherModels.of(job.algorithm, job.teacher_parameters)
        cuda = _check(config, others)
        cores = plan_here(config, [] if cuda else preload_libraries())
        notify(_start_message(config, cores))
        if config.ray.address == "local":  # elsewhere each verifier looks at its own host
            notify(f"verifiers behind walls: {'; '.join(walls_here(config.verifier))}")
            if walls := environment_walls(config.environment, "local"):
                notify(f"environments behind walls: {'; '.join(walls)}")
        connect(config, cores)
        reservation, generators = None, generator_names(config)
        if config.ray.address != "local" or config.transport.shares_devices:
            reservation = Reservation(wishes(config, actor_options(config, cores, cuda)))
            generators = await reservation.wait(config, config.ray.placement_timeout_s, notify)
        factory = ActorFactory(config, cores, cuda, version, origin, reservation)
        self._factory = factory.with_environments()
        self._actors, self._served = self._factory.all(generators, job), wanted
        return self._actors, False

    async def change_verifiers(self, verifier: VerifierConfig) -> Actors:
        """The actors, with new verifiers in the place of those that are open."""
        assert self._actors is not None
        old = self._actors.verifiers
        await self._all_answered([ask(handle, VerifierWorker.close) for handle in old.values()])
        for handle in old.values():
            handle.kill()
        changed = replace(self.factory.config, verifier=verifier)
        self._factory, self._served = replace(self.factory, config=changed), _sections(changed)
        verifiers = {name: self.factory.verifier(name) for name in old}
        self._actors = replace(self._actors, verifiers=verifiers)
        return self._actors

    async def end_run(self, log: Handle[TrajectoryLogWriter]) -> None:
        """Close what belongs to one run; the learner lets go of its policy."""
        assert self._actors is not None
        calls = [ask(handle, LearnerRank.shutdown) for handle in self._actors.learners]
        *_, closed = await self._all_answered([*calls, ask(log, TrajectoryLogWriter.close)])
        log.kill()
        if isinstance(closed, RayTaskError):
            print(
                f"warning: the trajectory log was not closed: {closed.cause}. Segments that are "
                "gone or torn are named by inspect --ledger",
                flush=True,
            )

    async def end(self, log_folder: Path) -> None:
        """End every actor and Ray; the logs of all processes go to `log_folder`."""
        if self._actors is not None:
            generators, verifiers = self._actors.generators, self._actors.verifiers
            teachers, environments = self._actors.teachers, self._actors.environments
            self._actors = None
            await self._all_answered(
                [ask(handle, Generator.shutdown) for handle in generators.values()]
                + [ask(handle, Generator.shutdown) for handle in teachers.values()]
                + [ask(handle, VerifierWorker.close) for handle in verifiers.values()]
                + [ask(handle, EnvironmentActor.shutdown) for handle in environments]
            )
        disconnect(log_folder)

    async def _all_answered(self, calls: list[Ref[None]]) -> list[object]:
        """Every actor was asked to end its own children; whatever does not answer is killed after.

        Errors are not raised, but returned in the place of an answer: a dead or hanging actor is
        why we may be here.
        """
        waiting = [
            self.waits.on(call, owner="shutdown", cause="an actor", deadline_s=SHUTDOWN_S)
            for call in calls
        ]
        return list(await asyncio.gather(*waiting, return_exceptions=True))


def _sections(config: ActorConfig) -> object:
    """What the actors are made from."""
    generator = replace(config.generator, max_staleness=0)
    learner = config.learner and (
        config.learner.ranks,
        config.learner.threads,
        config.learner.device,
    )
    transport, placement = config.transport.name, config.placement
    played = config.environment
    return (
        *(config.model, generator, config.verifier, played, _pool(config.teacher)),
        *(learner, transport, config.served_adapter, placement, config.ray),
    )


def _pool(teacher: TeacherConfig) -> TeacherConfig | None:
    """A teacher in generators of its own, which runs share; None for any other."""
    return teacher if teacher.count else None


def _check(config: ActorConfig, others: OtherModels) -> bool:
    """Whether the run uses CUDA. Raises `UserError` when it cannot run on this machine."""
    cuda = uses_cuda(config)
    if config.transport.needs_cuda and not cuda:
        choices = names_where(lambda transport: not transport.needs_cuda)
        raise UserError(
            f"weights.transport={config.transport.name} moves weights between CUDA devices "
            f"and there is none: use weights.transport={choices}"
        )
    check_device(config.generator.quantization, cuda=cuda)
    varlen = config.learner is not None and config.learner.attention == "varlen"
    if varlen and not (cuda and config.model.dtype == "bfloat16"):
        raise UserError(
            "learner.attention=varlen is a kernel for CUDA devices and bfloat16, and this run is "
            f"{config.model.dtype} on {'CUDA' if cuda else 'CPU'}: use learner.attention=grids"
        )
    if config.ray.address == "local":
        if cuda:
            _check_devices(config)
        else:
            check_memory(config, Path(config.model.path), others)
    return cuda


def _check_devices(config: ActorConfig) -> None:
    """Actors that ask for devices which a cluster of our own does not have wait for ever."""
    import torch

    here = torch.cuda.device_count()
    generators, ranks = config.generator.count, num_ranks(config)
    wanted = devices_wanted(config)
    if wanted > here:
        shared = names_where(lambda transport: transport.shares_devices)
        raise UserError(
            f"{generators} generator(s) and {ranks} learner rank(s) want {wanted:g} CUDA "
            f"device(s), and torch sees {here} here: lower generator.count or learner.ranks, have "
            f"them take turns on the same devices (weights.transport={shared}, "
            "generator.max_staleness=0), or train on the CPU (learner.device=cpu)"
        )


def _start_message(config: ActorConfig, cores: CorePlan) -> str:
    learners = (
        f"{len(cores.learner_cores)} learner rank(s) of {cores.learner_threads} thread(s), "
        if cores.learner_cores
        else ""
    )
    return (
        f"starting {config.generator.count} generator(s) of {cores.generator_threads} "
        f"thread(s), {learners}{config.verifier.workers} verifier(s), in {config.model.dtype} "
        f"({cores.reason})"
    )
