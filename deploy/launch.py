"""From configuration to result: the Python calls behind `grpo-lambda train` and comparisons."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ray.exceptions import RayError

from common.config import Config
from common.errors import RunError, StallError, UserError
from common.metrics import read_metrics
from common.stacks import stall_report
from deploy.preemption import Preemption
from deploy.restart import Restarts, is_recoverable
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
    task = asyncio.current_task()
    assert task is not None
    preemption = Preemption(task, configs[0].checkpoint.stop_grace_s)
    service, results = Service(), []
    for index, config in enumerate(configs):
        last = index == len(configs) - 1
        results.append(await _train_one(config, service, preemption, last=last))
        if preemption.requested.is_set():
            break
    return results


async def _train_one(
    config: Config, service: Service, preemption: Preemption, *, last: bool
) -> dict[str, float]:
    """A run in its directory, through the deaths of its processes."""
    automatic, config = config.resume == "auto", found(config)
    run = RunDirectory.reopen(config.resume) if config.resume else RunDirectory.create(config)
    restarts = Restarts(config.restart)
    try:
        if automatic and config.resume and is_done(run, config.steps):
            print(f"{run.path} is done, {config.steps} steps", flush=True)
            if last:
                await service.end(run.path / "log")
            return read_metrics(run.path / "metrics.jsonl")[-1]
        while True:
            try:
                return await _attempt(config, run, service, preemption, restarts, last=last)
            except Exception as error:
                if not is_recoverable(error):
                    raise
                wait_s = restarts.after(error)
                print(f"{_explained(error, run)}\nall processes start again in {wait_s:.0f} s")
            await asyncio.sleep(wait_s)
            config = replace(config, resume=str(run.path))
    except RayError as error:
        raise RunError(_explained(error, run)) from error
    except (UserError, RunError) as error:
        if type(error) in (UserError, RunError) and (run.path / "log").is_dir():
            raise type(error)(_explained(error, run)) from error
        raise
    finally:
        run.release()


def is_done(run: RunDirectory, steps: int) -> bool:
    """Whether a whole checkpoint of the last step is there; one that has none is not read."""
    last = max(run.checkpoints(), default=0)
    return last >= steps and run.newest_checkpoint(print) >= steps


def found(config: Config) -> Config:
    """`config` with `resume=auto` answered: the run of that name, or none."""
    if config.resume != "auto":
        return config
    if config.name is None:
        raise UserError("resume=auto needs name=, by which the run is found again")
    path = Path(config.runs_dir) / config.name
    there = (path / "config.yaml").is_file()
    return replace(config, resume=str(path) if there else None)


async def _attempt(
    config: Config,
    run: RunDirectory,
    service: Service,
    preemption: Preemption,
    restarts: Restarts,
    *,
    last: bool,
) -> dict[str, float]:
    """`service` is ended after the last run and after a failed one."""
    end_service = True
    try:
        result = await Run(config, run, service, preemption, restarts).main()
        end_service = last or preemption.requested.is_set()
        if preemption.requested.is_set():
            print(f"stopped by SIGTERM with a checkpoint; go on by resume={run.path}", flush=True)
        return result
    except StallError:
        print(stall_report(), flush=True)
        raise
    finally:
        if end_service:
            await service.end(run.path / "log")


def _explained(error: Exception, run: RunDirectory) -> str:
    """The error, and what the processes themselves said last."""
    cause = getattr(error, "cause", None) or error
    said = last_errors(run.path / "log")
    lines = [f"{cause}", *(f"  {line}" for line in said), f"Logs of all processes: {run.path}/log"]
    return "\n".join(lines)
