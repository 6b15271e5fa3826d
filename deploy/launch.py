"""From configuration to result: the Python calls behind `grpo-lambda train` and comparisons."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Sequence
from typing import Any

from ray.exceptions import RayError

from common.config import Config
from common.errors import RunError, UserError
from deploy.run import Run
from deploy.run_dir import RunDirectory, last_errors
from deploy.service import Service


def train(config: Config) -> dict[str, float]:
    """Run to the end; returns the last step's metrics.

    Raises:
        UserError: wrong input. RunError: the run cannot go on; its cause is the message.
        KeyboardInterrupt: after everything was ended and the run directory closed.
    """
    return train_each([config])[0]


def train_each(configs: Sequence[Config]) -> list[dict[str, float]]:
    """One run after the other in the same processes; the results in order.

    Raises as `train` does, at the first run that fails; `UserError` too when a run needs other
    actors than the first (see `Service.open`).
    """
    return asyncio.run(_train_each(configs))


async def _train_each(configs: Sequence[Config]) -> list[dict[str, float]]:
    stop_on_sigterm(asyncio.current_task())
    service = Service()
    return [
        await _train_one(config, service, last=index == len(configs) - 1)
        for index, config in enumerate(configs)
    ]


async def _train_one(config: Config, service: Service, *, last: bool) -> dict[str, float]:
    """A run in its directory. `service` is ended after the last run and after a failed one."""
    run = RunDirectory.reopen(config.resume) if config.resume else RunDirectory.create(config)
    end_service = True
    try:
        try:
            result = await Run(config, run, service).main()
            end_service = last
            return result
        finally:
            if end_service:
                await service.end(run.path / "log")
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


def stop_on_sigterm(task: asyncio.Task[Any] | None) -> None:
    """SIGTERM ends the run as Ctrl-C does."""
    if task is not None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel, "SIGTERM")
