"""One run through the deaths of its processes: from its directory to its last record.

find, or make, the run directory
run; when a process is lost: end all, wait, and run on from the last checkpoint
leave the directory, with an error that says what the processes said last
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from ray.exceptions import RayError

from common.config.sections import Config
from common.errors import RunError, StallError, UserError
from common.record.metrics import read_metrics
from common.supervision.stacks import stall_report
from deploy.placement.devices import on_these_devices
from deploy.run.coordinator import Run
from deploy.run.directory import RunDirectory, explained
from deploy.run.mirror import Mirror
from deploy.run.preemption import Preemption
from deploy.run.restart_budget import RestartBudget, is_recoverable
from deploy.run.service import Service
from deploy.run.settled import settled


async def train_to_end(
    config: Config, service: Service, preemption: Preemption, *, last: bool
) -> tuple[Path, dict[str, float]]:
    """Run to the end; the run directory and the last record.

    Args:
        last: no other run follows, so `service` is ended. It is ended after a failure too.

    Raises: as `deploy.launch.train`.
    """
    automatic = config.resume == "auto"
    config = settled(found(config), partial(print, flush=True))
    config, said = on_these_devices(config)
    if said is not None:
        print(said, flush=True)
    run = RunDirectory.reopen(config.resume) if config.resume else RunDirectory.create(config)
    with _explaining(run):
        async with _ended_on_failure(service, run):
            if automatic and config.resume and is_done(run, config.steps):
                final = await _done(config, run)
            else:
                final = await _through_deaths(config, run, service, preemption)
        if last or preemption.requested.is_set():
            await service.end(run.path / "log")
    return run.path, final


async def _through_deaths(
    config: Config, run: RunDirectory, service: Service, preemption: Preemption
) -> dict[str, float]:
    """The last record of a run that goes on from its last checkpoint when a process is lost."""
    restarts = RestartBudget(config.restart)
    while True:
        try:
            async with _ended_on_failure(service, run):
                final = await Run(config, run, service, preemption, restarts).main()
        except Exception as error:
            if not is_recoverable(error):
                raise
            if is_done(run, config.steps):  # it failed behind its last checkpoint
                print(_said(error, run), flush=True)
                return await _done(config, run)
            wait_s = restarts.after(error, last_step(run), run.how_to_go_on)
            print(f"{_said(error, run)}\nall processes start again in {wait_s:.0f} s", flush=True)
        else:
            if preemption.requested.is_set():
                print(
                    f"stopped by SIGTERM with a checkpoint; go on by resume={run.path}", flush=True
                )
            return final
        await asyncio.sleep(wait_s)
        config = replace(config, resume=str(run.path))


@asynccontextmanager
async def _ended_on_failure(service: Service, run: RunDirectory) -> AsyncIterator[None]:
    """After a failure no process is left; of one that hangs, its stack is printed first."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, StallError):
            print(stall_report(), flush=True)
        await service.end(run.path / "log")
        raise


@contextmanager
def _explaining(run: RunDirectory) -> Iterator[None]:
    """An error that leaves the run says what its processes said last; the directory is released."""
    try:
        yield
    except RayError as error:
        raise RunError(_said(error, run)) from error
    except (UserError, RunError) as error:
        if type(error) in (UserError, RunError) and (run.path / "log").is_dir():
            raise type(error)(_said(error, run)) from error
        raise
    finally:
        run.release()


def _said(error: Exception, run: RunDirectory) -> str:
    """The error, and what the processes themselves said last."""
    logs = run.path / "log"
    return explained(error, logs, f"Logs of all processes: {logs}")


async def _done(config: Config, run: RunDirectory) -> dict[str, float]:
    """The last record of a run that is done; its copy is brought up to date."""
    print(f"{run.path} is done, {config.steps} steps", flush=True)
    if config.checkpoint.mirror is not None:
        copying = asyncio.to_thread(Mirror(config.checkpoint.mirror).push, run.path)
        try:
            await asyncio.wait_for(copying, config.checkpoint.timeout_s)
        except TimeoutError as error:
            raise RunError(
                f"the copy of {run.path} to {config.checkpoint.mirror} did not end within "
                f"checkpoint.timeout_s={config.checkpoint.timeout_s:g}: submit the run once more "
                "with resume=auto, which goes on with the copy"
            ) from error
    return read_metrics(run.path / "metrics.jsonl")[-1]


def last_step(run: RunDirectory) -> int:
    """The last step on record; 0 before any."""
    path = run.path / "metrics.jsonl"
    records = read_metrics(path) if path.is_file() else []
    return int(records[-1]["step"]) if records else 0


def is_done(run: RunDirectory, steps: int) -> bool:
    """Whether a whole checkpoint of the last step is there."""
    last = max(run.checkpoints(), default=0)
    return last >= steps and run.newest_checkpoint(print) >= steps


def found(config: Config) -> Config:
    """`config` with `resume=auto` answered: the run of that name, its copy, or none."""
    if config.resume != "auto":
        return config
    if config.name is None:
        raise UserError("resume=auto needs name=, by which the run is found again")
    path = Path(config.runs_dir).expanduser() / config.name
    there = (path / "config.yaml").is_file()
    if not there and config.checkpoint.mirror is not None:
        there = Mirror(config.checkpoint.mirror).pull(path, print)
    return replace(config, resume=str(path) if there else None)
