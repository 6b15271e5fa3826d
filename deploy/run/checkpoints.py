"""A run's checkpoints, as its learner's loop asks for them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from common.config.sections import CheckpointConfig
from common.supervision.faults import reached
from common.supervision.waits import Waits
from deploy.run.directory import RunDirectory
from deploy.run.mirror import Mirror
from learner.training.ranks import LearnerRanks


@dataclass(frozen=True)
class Checkpoints:
    """Takes and writes them, and removes what the configuration does not keep."""

    config: CheckpointConfig
    run: RunDirectory
    learner: LearnerRanks
    cut: Callable[[int], dict[str, Any]]
    """Cuts the ledger at a step and returns what else a resume needs, as JSON."""
    notify: Callable[[str], None]
    waits: Waits
    mirror: Mirror | None = None

    async def take(self, step: int) -> None:
        """Into the learner's memory, which is at `step` and stays there until this returns."""
        state = self.cut(step)
        reached("ledger cut")
        await self.learner.take_checkpoint(state, self.config.timeout_s)
        reached("checkpoint taken")

    async def write(self, step: int) -> None:
        """What was taken, to its folder; the learner may step on."""
        folder = self.run.checkpoint(step)
        folder.parent.mkdir(exist_ok=True)
        await self.learner.write_checkpoint(str(folder), self.config.timeout_s)
        reached("checkpoint in place")
        self.run.prune_checkpoints(step, self.config.keep_last, self.config.keep_every)
        self.notify(f"checkpoint {folder}")
        if self.mirror is not None:
            copying = asyncio.to_thread(self.mirror.push, self.run.path)
            timeout_s = self.config.timeout_s
            copied = await self.waits.on(
                copying, owner="checkpoint", cause="its copy in the mirror", deadline_s=timeout_s
            )
            self.notify(f"copied {copied / 1e6:.1f} MB to {self.config.mirror}")
