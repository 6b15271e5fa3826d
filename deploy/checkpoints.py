"""A run's checkpoints, as its learner's loop asks for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from common.config import CheckpointConfig
from common.faults import reached
from deploy.run_dir import RunDirectory
from learner.group import LearnerGroup


class Checkpoints:
    """Takes and writes them, and removes what the configuration does not keep.

    Args:
        cut: cuts the ledger at a step and returns what else a resume needs, as JSON.
    """

    def __init__(
        self,
        config: CheckpointConfig,
        run: RunDirectory,
        learner: LearnerGroup,
        cut: Callable[[int], dict[str, Any]],
        say: Callable[[str], None],
    ) -> None:
        self._config = config
        self._run = run
        self._learner = learner
        self._cut = cut
        self._say = say

    async def take(self, step: int) -> None:
        """Into the learner's memory, which is at `step` and stays there until this returns."""
        state = self._cut(step)
        reached("ledger cut")
        await self._learner.take_checkpoint(state, self._config.timeout_s)
        reached("checkpoint taken")

    async def write(self, step: int) -> None:
        """What was taken, to its folder; the learner may step on."""
        folder = self._run.checkpoint(step)
        folder.parent.mkdir(exist_ok=True)
        await self._learner.write_checkpoint(str(folder), self._config.timeout_s)
        reached("checkpoint in place")
        self._run.prune_checkpoints(self._config.keep_last, self._config.keep_every)
        self._say(f"checkpoint {folder}")
