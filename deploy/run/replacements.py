"""Generators, verifiers and the log's writer start again by themselves, while the others go on.

The learner does not: its ranks hold one model together, so all start again from the last checkpoint
(`deploy.run.restart_budget`). Nor does a generator whose weights come by a collective (nccl, ipc).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from actors.generation.generator import Generator
from actors.verifiers.worker import VerifierWorker
from common.record.writer import TrajectoryLogWriter
from common.supervision.calls import Handle
from common.supervision.replacement import Replacement
from deploy.run.actors import ActorFactory, start_log
from deploy.run.directory import RunDirectory
from deploy.run.restart_budget import RestartBudget

T = TypeVar("T")


class Replacements:
    """Makes the actors that come in the place of dead ones, and counts them."""

    def __init__(
        self,
        factory: ActorFactory,
        run: RunDirectory,
        restarts: RestartBudget,
        notify: Callable[[str], None],
    ) -> None:
        self._factory = factory
        self._run = run
        self._restarts = restarts
        self._notify = notify

    def generators(self) -> Replacement[Generator] | None:
        """How a generator is replaced; None where a new one could not get the weights."""
        if not self._factory.config.transport.survives_a_death:
            return None
        return self._by(self._generator, has_place=True)

    def verifiers(self) -> Replacement[VerifierWorker]:
        return self._by(self._factory.verifier)

    def log(self) -> Replacement[TrajectoryLogWriter]:
        return self._by(lambda _: start_log(self._factory.config.verifier, self._run.path))

    def _by(self, make: Callable[[str], Handle[T]], *, has_place: bool = False) -> Replacement[T]:
        """`has_place`: the cluster keeps a place for each, under its name."""
        config, reservation = self._factory.config, self._factory.reservation
        deadline_s = config.generator.start_timeout_s
        replacement = Replacement(make, self._restarts.after, self._notify, deadline_s)
        if reservation is None or not has_place:
            return replacement
        return replace(replacement, room=reservation.room, room_s=config.ray.placement_timeout_s)

    def _generator(self, name: str) -> Handle[Generator]:
        folder = self._factory.config.model.path
        # A checkpoint may have been pruned since. Adapters do not stand beside one, but beside the
        # model that the run began from, which no run removes.
        if not Path(folder).is_dir() and self._factory.config.served_adapter is None:
            newest = self._run.newest_checkpoint(self._notify)
            folder = str(self._run.checkpoint(newest))
        return self._factory.generator(name, folder)
