"""The run directory: what is where, names of new runs, and which checkpoint to go on from.

runs/NAME/config.yaml           the resolved configuration
         /metrics.jsonl         one object a learner step; tensorboard/ holds the same
         /trajectories/         every verified group (Arrow; closed segments also as Parquet)
         /credit/               what every token was credited with (`common.record.credit_log`)
         /evaluations/          held-out completions, a Parquet file an evaluation
         /checkpoints/step-N/   a Hugging Face folder with training_state/ inside
         /ledger.sqlite         what became of every completion (`common.record.ledger`)
         /log/                  what every process printed, copied when the run ends
"""

from __future__ import annotations

import datetime
import fcntl
import hashlib
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from common.config.load import dump_config
from common.config.sections import Config
from common.errors import UserError
from common.record.manifest import damage
from deploy.run.restart_budget import wanted_of_lost

LEDGER = "ledger.sqlite"
QUARANTINE = "quarantine.jsonl"
FAILED_BATCH = "failed-batch.arrow"
_LOOK_S = 0.5
"""Seconds to try for the lock: longer than `deploy.inspector.account.is_live`, which only looks
whether a run is going on, holds it."""
_WRITTEN = ".config.sha256"
"""The digest of config.yaml as the run wrote it; a copy elsewhere has none."""
_STEP = re.compile(r"^step-(\d+)$")


_ERROR_LINE = re.compile(r"(?:^|[\s\]])((?:\w+\.)*\w*(?:Error|Exception|Killed): .+)$")


_OWN_END = "vLLM's engine was shut down"
"""Said by a generator that the run has ended itself."""


def last_errors(log_folder: Path, count: int = 3) -> list[str]:
    """The last distinct error lines in a run's process logs: usually the root of a failure."""
    found: dict[str, None] = {}
    for path in sorted(log_folder.glob("*"), key=lambda file: file.stat().st_mtime):
        for line in path.read_text(errors="replace").splitlines():
            match = _ERROR_LINE.search(line)
            if match and not match.group(1).endswith(_OWN_END):
                found.pop(match.group(1), None)
                found[match.group(1)] = None
    return list(found)[-count:]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _locked(file: TextIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def explained(error: BaseException, log_folder: Path, advice: str) -> str:
    """The error, who met it, what the processes themselves said last, and `advice`."""
    cause = getattr(error, "cause", None) or error
    said = last_errors(log_folder)
    lines = [*wanted_of_lost(error), *said]
    return "\n".join([str(cause), *(f"  {line}" for line in lines), advice])


class RunDirectory:
    """One run's folder, locked for as long as this process trains in it."""

    def __init__(self, path: Path) -> None:
        self.path = path.resolve()
        self._lock: TextIO | None = None

    @classmethod
    def create(cls, config: Config) -> RunDirectory:
        """A new folder. Raises `UserError` when the name is taken or the place is not writable."""
        name = config.name or datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
        if not re.fullmatch(r"[\w.\-]+", name) or not name.strip("."):
            raise UserError(f"name={name}: use letters, digits, '.', '_' and '-' only")
        path = Path(config.runs_dir).expanduser() / name
        try:
            return cls.make(path, dump_config(config))
        except FileExistsError as error:
            raise UserError(
                f"{path.resolve()} exists: choose another name=, or go on with it by "
                f"resume={config.runs_dir}/{name}"
            ) from error
        except OSError as error:
            raise UserError(
                f"cannot write to {path.resolve()}: {error.strerror}; set runs_dir"
            ) from error

    @classmethod
    def make(cls, path: Path, config: str) -> RunDirectory:
        """A new folder at `path` with `config` as its config.yaml. Raises `OSError`."""
        run = cls(path)
        run.path.mkdir(parents=True, exist_ok=False)
        (run.path / "config.yaml").write_text(config)
        (run.path / _WRITTEN).write_text(_digest(config))
        run._acquire()
        return run

    @classmethod
    def reopen(cls, path: str) -> RunDirectory:
        """An existing run. Raises `UserError` when there is none or it is being trained now."""
        run = cls(Path(path).expanduser())
        if not (run.path / "config.yaml").is_file():
            raise UserError(
                f"resume={path}: there is no run (no config.yaml in {run.path}); give runs/NAME"
            )
        run._acquire()
        return run

    def _acquire(self) -> None:
        try:
            self._lock = (self.path / ".lock").open("w")
        except OSError as error:
            raise UserError(
                f"cannot write to {self.path}: {error.strerror}; mend the disk or its permissions"
            ) from error
        deadline = time.monotonic() + _LOOK_S
        while not _locked(self._lock):
            if time.monotonic() > deadline:
                raise UserError(
                    f"{self.path} is being trained by another process: wait for it to end, or "
                    "start a run of another name="
                )
            time.sleep(0.02)
        self._lock.write(str(os.getpid()))
        self._lock.flush()

    def config_was_edited(self) -> bool:
        """Whether config.yaml is another than the run has written; False where nobody knows."""
        written = self.path / _WRITTEN
        now = (self.path / "config.yaml").read_text(encoding="utf-8", errors="replace")
        return written.is_file() and written.read_text() != _digest(now)

    def release(self) -> None:
        """Let another process train here. A run that never started leaves no folder behind."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None
        if not self._has_begun:
            shutil.rmtree(self.path)

    @property
    def _has_begun(self) -> bool:
        return not {entry.name for entry in self.path.iterdir()} <= {
            "config.yaml",
            _WRITTEN,
            ".lock",
        }

    @property
    def how_to_go_on(self) -> str:
        """What a person does when the cause of a failure is mended."""
        return f"go on by resume={self.path}" if self._has_begun else "start the run again"

    def checkpoint(self, step: int) -> Path:
        return self.path / "checkpoints" / f"step-{step}"

    def checkpoints(self) -> list[int]:
        """Steps of complete checkpoints, oldest first."""
        folder = self.path / "checkpoints"
        if not folder.is_dir():
            return []
        found = [_STEP.match(entry.name) for entry in folder.iterdir() if entry.is_dir()]
        return sorted(int(match.group(1)) for match in found if match)

    def newest_checkpoint(self, notify: Callable[[str], None], before: int | None = None) -> int:
        """Step of the newest checkpoint that is whole, or 0; damaged ones are named and passed.

        With `before` none of that step or later counts.
        """
        for step in reversed(self.checkpoints()):
            if before is not None and step >= before:
                continue
            wrong = damage(self.checkpoint(step))
            if wrong is None:
                return step
            notify(f"warning: checkpoint {self.checkpoint(step)} is damaged, passed over: {wrong}")
        return 0

    def prune_checkpoints(self, newest: int, keep_last: int, keep_every: int) -> None:
        """Keep the last `keep_last` up to `newest` and of the older every `keep_every`-th step.

        With `keep_last` 0 all are kept. What is later than `newest` was damaged when the run was
        resumed from before it: it counts for nothing, and stays until its step is written again.
        """
        steps = [step for step in self.checkpoints() if step <= newest]
        for step in steps[:-keep_last] if keep_last > 0 else []:
            if not (keep_every and step % keep_every == 0):
                shutil.rmtree(self.checkpoint(step))
