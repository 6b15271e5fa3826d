"""Ray, the generators and the verifiers: the part of a run that the next run can use again.

Starting vLLM takes most of a short run's time. A comparison of many recipes therefore keeps one
`Service` and sends each run's first weights to the generators that the last run left behind.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray

from common.config import Config
from common.errors import UserError
from common.waits import Waits
from deploy.cluster import Serving, Training, connect, disconnect, start_serving, start_training
from deploy.cpu_runtime import preload_libraries
from deploy.memory import check_memory
from deploy.placement import CorePlan, available_cores, plan_cores, uses_cuda

SHUTDOWN_S = 30.0


class Service:
    """Starts with the first run that needs it; `end` ends everything that was started."""

    def __init__(self) -> None:
        self.waits = Waits()
        self._serving: Serving | None = None
        self._served: object = None

    def open(
        self, config: Config, folder: str, version: int, say: Callable[[str], None]
    ) -> tuple[Serving, bool]:
        """Generators and verifiers for `config`, and whether they already hold other weights.

        `folder` holds the model's weights, `version` is theirs.

        Raises:
            UserError: the configuration cannot run here, or needs other generators than the runs
                before it.
        """
        config = replace(config, model=replace(config.model, path=folder))
        wanted = _sections(config)
        if self._serving is not None:
            if wanted != self._served:
                raise UserError(
                    "runs that share generators must have the same model, generator, verifier, "
                    "weights and ray sections (generator.max_staleness may differ)"
                )
            return self._serving, True
        cuda = _check(config)
        cores = plan_cores(config, available_cores(), [] if cuda else preload_libraries())
        say(_described(config, cores))
        connect(config, cores)
        self._serving, self._served = start_serving(config, cores, cuda, version), wanted
        return self._serving, False

    def train(self, config: Config, folder: str, run_folder: Path) -> Training:
        """The learner and the stream of one run."""
        config = replace(config, model=replace(config.model, path=folder))
        cores = plan_cores(config, available_cores(), [])
        return start_training(config, cores, uses_cuda(config), run_folder)

    async def end_training(self, training: Training) -> None:
        """Close a run's own actors, then kill them."""
        calls = [handle.shutdown.remote() for handle in training.learners]
        await self._all_answered([*calls, training.stream.close.remote()])
        for handle in [*training.learners, training.stream]:
            ray.kill(handle)

    async def end(self, log_folder: Path) -> None:
        """End generators, verifiers and Ray; the logs of all processes go to `log_folder`."""
        if self._serving is not None:
            generators, verifiers = self._serving.generators, self._serving.verifiers
            self._serving = None
            await self._all_answered(
                [handle.shutdown.remote() for handle in generators.values()]
                + [handle.close.remote() for handle in verifiers.values()]
            )
        disconnect(log_folder)

    async def _all_answered(self, calls: list[Any]) -> None:
        """Every actor was asked to end its own children; whatever does not answer is killed after.

        Errors are not raised: a dead or hanging actor is why we may be here.
        """
        waiting = [
            self.waits.on(call, owner="shutdown", cause="an actor", deadline_s=SHUTDOWN_S)
            for call in calls
        ]
        await asyncio.gather(*waiting, return_exceptions=True)


def _sections(config: Config) -> object:
    """What generators and verifiers are made from."""
    generator = replace(config.generator, max_staleness=0)
    return config.model, generator, config.verifier, config.weights.transport, config.ray


def _check(config: Config) -> bool:
    """Whether the run uses CUDA. Raises `UserError` when it cannot run on this machine."""
    cuda = uses_cuda(config)
    if config.weights.transport != "object_store" and not cuda:
        raise UserError(
            f"weights.transport={config.weights.transport} moves weights between CUDA devices "
            "and there is none: use weights.transport=object_store"
        )
    if not cuda and config.ray.address == "local":
        check_memory(config, Path(config.model.path))
    return cuda


def _described(config: Config, cores: CorePlan) -> str:
    return (
        f"starting {config.generator.count} generator(s) of {cores.generator_threads} "
        f"thread(s), {config.learner.ranks} learner rank(s) of {cores.learner_threads} "
        f"thread(s), {config.verifier.workers} verifier(s) ({cores.reason})"
    )
