"""Ray: connecting with a deadline, starting the actors, ending without leftovers."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray._common.utils import get_default_ray_temp_dir
from ray._private import parameter, ray_constants

from actors.environments.actor import EnvironmentActor
from actors.generation.generator import Generator
from actors.verifiers.registry import verifier_names
from actors.verifiers.worker import VerifierWorker
from common.config.sections import Config, VerifierConfig
from common.errors import StartError, UserError
from common.record.writer import TrajectoryLogWriter
from common.supervision.calls import Handle, start_actor
from common.supervision.stacks import descendants
from deploy.models.resolve import ModelLocation
from deploy.placement.config import ActorConfig, teacher_generator, teacher_names
from deploy.placement.memory import count_parameters
from deploy.placement.options import (
    LOG_OPTIONS,
    ActorOptions,
    CorePlan,
    actor_options,
    cpus_needed,
    environment_actors,
    object_store_bytes,
)
from deploy.placement.reservation import ENVIRONMENTS, LEARNER, VERIFIERS, Reservation
from deploy.run.printed import Cutter, copy_printed
from learner.training.job import LearnerJob
from learner.training.rank import LearnerRank

PROJECT_ROOT = Path(__file__).resolve().parents[2]
_LOG_BYTES = 64 * 2**20
"""Of what a process has printed the newest 64 MiB stay (`deploy.run.printed`)."""
_cutters: list[Cutter] = []
"""Of the cluster of our own, where there is one."""
_TASKS_REMEMBERED = 2_000
"""By Ray's server, for its own tools: of 100,000, its default, a long run has it grow by 200 MB."""


@dataclass(frozen=True)
class Actors:
    """The actors that several runs may use one after the other.

    A pool keeps its mapping up to date: whoever ends the actors finds those that are there then.
    """

    generators: dict[str, Handle[Generator]]
    verifiers: dict[str, Handle[VerifierWorker]]
    learners: list[Handle[LearnerRank]]
    environments: Sequence[Handle[EnvironmentActor]] = ()
    teachers: Mapping[str, Handle[Generator]] = field(default_factory=dict)
    """The generators that hold the teacher, where it has any."""


def connect(config: ActorConfig, cores: CorePlan) -> None:
    """Join the cluster that `ray.address` names, or start one of our own for `local`.

    Raises:
        UserError: nothing answers at the address.
    """
    # A group's batch is acknowledged apart from its content (`actors.rollout.pools`): the
    # acknowledgement raises what went wrong, and Ray would print the same again for the batch
    # nobody fetched.
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
    address = config.ray.address
    environment = {"env_vars": {"PYTHONPATH": _python_path()}}
    if address == "local":
        _start_ray(config, cores, environment)
        return
    _check_address(address, config.ray.connect_timeout_s)
    try:
        ray.init(
            address=address, log_to_driver=False, logging_level="ERROR", runtime_env=environment
        )
    except (ConnectionError, RuntimeError, TimeoutError) as error:
        raise UserError(
            f"no Ray cluster at ray.address={address}: {error}. Start one with `ray start --head`, "
            "or use ray.address=local; one that asks for a token wants RAY_AUTH_MODE=token and its "
            "token in RAY_AUTH_TOKEN or ~/.ray/auth_token"
        ) from error


@contextmanager
def _on_loopback() -> Iterator[None]:
    """A node that Ray starts meanwhile listens at 127.0.0.1 alone, at ports that are free.

    The argument `_node_ip_address` does not do it: Ray takes the host's outer address for 127.0.0.1
    wherever it thinks that other nodes might join. And its agent wants one certain port. Where
    another run has it, Ray waits for 3 s before it does without.
    """
    cluster, parameters = ray_constants.ENABLE_RAY_CLUSTER, parameter.RayParams
    ray_constants.ENABLE_RAY_CLUSTER = False
    parameter.RayParams = partial(parameters, dashboard_agent_listen_port=0)
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER, parameter.RayParams = cluster, parameters


def _start_ray(config: ActorConfig, cores: CorePlan, environment: dict[str, Any]) -> None:
    """Start a cluster of our own.

    Raises:
        UserError: it cannot start on this machine, now or later.
        StartError: it was not there in time.
    """
    folder = Path(get_default_ray_temp_dir())
    _check_socket_paths(folder)
    try:
        with _on_loopback():
            ray.init(
                address="local",
                num_cpus=cpus_needed(config, cores),
                object_store_memory=object_store_bytes(config),
                include_dashboard=False,
                log_to_driver=False,
                logging_level="ERROR",
                runtime_env=environment,
                _system_config={"task_events_max_num_task_in_gcs": _TASKS_REMEMBERED},
            )
        _cutters.append(Cutter(_printed(), _LOG_BYTES))
    except Exception as error:  # Ray raises just that when its node is not up in 30 s
        _kill_servers()  # else they live until this process ends
        logs = f"Ray's logs are under {folder / 'session_latest' / 'logs'}"
        late = isinstance(error, (ConnectionError, TimeoutError))
        if isinstance(error, (OSError, ValueError)) and not late:
            raise UserError(f"Ray cannot start on this machine: {error}. {logs}") from error
        raise StartError(
            f"Ray did not start on this machine: {error} If it is busy, try again. {logs}"
        ) from error


_SOCKET_BYTES = 107
"""Longest path of a Unix socket on Linux."""
_SOCKET = "session_2026-01-01_00-00-00_000000_0000000/sockets/plasma_store"
"""What Ray puts behind its temporary folder."""


def _check_socket_paths(folder: Path) -> None:
    """Raise `UserError` where Ray's sockets would have longer paths than the kernel takes."""
    excess = len(os.fsencode(folder / _SOCKET)) - _SOCKET_BYTES
    if excess > 0:
        variable = "RAY_TMPDIR" if "RAY_TMPDIR" in os.environ else "TMPDIR"
        raise UserError(
            f"Ray keeps its sockets under {folder}, and their paths would be {excess} byte(s) "
            f"longer than the {_SOCKET_BYTES} that a Unix socket's may have: set {variable} to a "
            "shorter folder, such as /tmp"
        )


def _python_path() -> str:
    """Actors import the project from here also when it is not installed."""
    inherited = os.environ.get("PYTHONPATH", "")
    return os.pathsep.join([str(PROJECT_ROOT), *([inherited] if inherited else [])])


def _check_address(address: str, timeout_s: float) -> None:
    """Ray waits for minutes on an address where nothing listens: knock first."""
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    if address.startswith("ray://") or not host or not port.isdigit():
        raise UserError(
            f"ray.address={address}: use local, auto or HOST:PORT (Ray Client, ray://, cannot "
            "stream from actors: submit the run as a job on the cluster instead)"
        )
    try:
        with socket.create_connection((host, int(port)), timeout=timeout_s):
            return
    except OSError as error:
        raise UserError(
            f"nothing answers at ray.address={address} ({error}): start the cluster with "
            "`ray start --head --port PORT`, or use ray.address=local"
        ) from error


@dataclass(frozen=True)
class ActorFactory:
    """Makes the actors of a configuration, the first ones and those in the place of dead ones.

    `config.model.path` is a folder of this node by now, with the weights of `version`. Where the
    generators sample with adapters (`config.served_adapter`), it has those beside which they stand.
    """

    config: ActorConfig
    cores: CorePlan
    cuda: bool
    version: int
    locate: ModelLocation
    reservation: Reservation | None = None
    """Places on a cluster; None on one of our own, which is as large as the run."""
    environments: Sequence[Handle[EnvironmentActor]] = ()
    """What the generators play episodes in, where that is not beside them."""

    def with_environments(self) -> ActorFactory:
        """This factory, and the actors of environments that its generators need."""
        options, config = self._options.environment, self.config.environment
        actors = [
            start_actor(EnvironmentActor, options | self._place(ENVIRONMENTS, index), config)
            for index in range(environment_actors(self.config))
        ]
        return replace(self, environments=actors)

    def generator(self, name: str, model_folder: str) -> Handle[Generator]:
        """Start the generator called `name`, generator-N, with the weights in `model_folder`."""
        config, index = self.config, int(name.rpartition("-")[2])
        options = self._options.generator | self._place(name)
        return start_actor(
            Generator,
            options,
            name,
            replace(config.model, path=model_folder),
            config.generator,
            config.transport.name,
            config.seed + index,
            self.version,
            self.cores.generator_cores[index] if self._bound else None,
            self.locate,
            config.environment,
            config.data,
            self.environments,
            config.served_adapter,
        )

    def teacher(self, name: str) -> Handle[Generator]:
        """Start the generator called `name`, teacher-N, with the teacher in it."""
        config, options = self.config, self._options.teacher | self._place(name)
        assert config.teacher.path is not None
        longest = config.model.max_length + 1  # a score is asked for with a token behind it
        return start_actor(
            Generator,
            options,
            name,
            replace(config.model, path=config.teacher.path, max_length=longest),
            teacher_generator(config),
            config.transport.name,
            config.seed,
            0,
            None,
        )

    def verifier(self, name: str) -> Handle[VerifierWorker]:
        """Start the verifier called `name`, verifier-N."""
        index = int(name.rpartition("-")[2])
        options = self._options.verifier | self._place(VERIFIERS, index)
        return start_actor(VerifierWorker, options, self.config.verifier)

    def _place(self, name: str, index: int = 0) -> dict[str, Any]:
        return {} if self.reservation is None else self.reservation.options(name, index)

    def all(self, generators: Sequence[str], job: LearnerJob | None) -> Actors:
        """Every actor but the log's writer; they start up on their own, their caller awaits them.

        Args:
            generators: names of those for which there is room.
            job: what the learner is to do; None where there is none.
        """
        config, verifiers = self.config, range(self.config.verifier.workers)
        learners = self._learners(job) if job is not None else []
        return Actors(
            {name: self.generator(name, config.model.path) for name in generators},
            {name: self.verifier(name) for name in (f"verifier-{index}" for index in verifiers)},
            learners,
            self.environments,
            {name: self.teacher(name) for name in teacher_names(config)},
        )

    def _learners(self, job: LearnerJob) -> list[Handle[LearnerRank]]:
        return [
            start_actor(
                LearnerRank,
                self._options.learner | self._place(LEARNER, rank),
                job,
                rank,
                self.cores.learner_cores[rank] if self._bound else None,
                locate=self.locate,
            )
            for rank in range(len(self.cores.learner_cores))
        ]

    @property
    def _options(self) -> ActorOptions:
        return actor_options(self.config, self.cores, self.cuda)

    @property
    def _bound(self) -> bool:
        """Core numbers mean nothing on other machines."""
        return self.config.ray.address == "local" and not self.cuda


def learner_job(
    config: Config, origin: ModelLocation, *, scores_on_record: bool = False
) -> LearnerJob:
    """What a run with a local `config.model.path`, begun from `origin`, asks of the learner.

    Args:
        scores_on_record: its steps are given what their scorer said.
    """
    names = verifier_names(config.verifier)
    teacher = None if config.teacher.count else config.teacher.path
    return LearnerJob(
        model=config.model,
        reference_path=origin.folder,
        teacher_path=teacher,
        teacher_parameters=count_parameters(Path(teacher)) if teacher else 0,
        teacher_offload=config.teacher.offload,
        scores_on_record=scores_on_record,
        learner=config.learner,
        algorithm=config.algorithm,
        correction_kind=config.correction_kind,
        max_completion_tokens=config.generator.max_completion_tokens,
        temperature=config.generator.temperature,
        seed=config.seed,
        total_steps=config.steps,
        primary_verifier=names[0],
        reward_weights={
            name: rule.weight for name, rule in zip(names, config.verifier.rules, strict=True)
        },
        bucket_mib=config.weights.bucket_mib,
        transport=config.weights.transport,
        publish=config.weights.publish,
        tokens_per_microbatch=config.batch.tokens_per_microbatch,
        checkpoint_timeout_s=config.checkpoint.timeout_s,
    )


def start_log(verifier: VerifierConfig, run_folder: Path) -> Handle[TrajectoryLogWriter]:
    """The writer of one run's trajectory log, in whose rows `verifier` has a column a rule."""
    names = verifier_names(verifier)
    return start_actor(TrajectoryLogWriter, LOG_OPTIONS, str(run_folder), names)


_LET_GO_S = 20.0
_SERVERS = ("raylet", "gcs_server")


def _tear_away() -> None:
    """Kill the servers of a cluster of our own that hang; leave one of others by ending."""
    if not _kill_servers():
        print(
            f"error: Ray did not let go of this process within {_LET_GO_S:.0f} s, so it ends; go "
            "on by resume=",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)


def _kill_servers() -> int:
    """Those that this process has started; how many."""
    servers = [
        process.pid for process in descendants(os.getpid()) if process.name.startswith(_SERVERS)
    ]
    for pid in servers:
        os.kill(pid, signal.SIGKILL)
    return len(servers)


def _printed() -> Path:
    """Where the processes of this node print."""
    return Path(ray._private.worker._global_node.get_session_dir_path()) / "logs"


def disconnect(log_folder: Path) -> None:
    """Leave Ray; a cluster of our own ends with it. Keeps the logs of its processes."""
    if not ray.is_initialized():
        return
    printed = _printed()
    while _cutters:
        _cutters.pop().stop()
    impatient = threading.Timer(_LET_GO_S, _tear_away)
    impatient.daemon = True
    impatient.start()
    try:
        ray.shutdown()  # waits for the raylet without a deadline
    finally:
        impatient.cancel()
    copy_printed(printed, log_folder)
