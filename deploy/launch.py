"""From configuration to result: the calls behind `grpo-lambda train`, comparisons and notebooks.

from deploy.launch import train
result = train("deploy/configs/tiny.yaml", steps=20, **{"batch.group_size": 4})
result.final["reward/mean"], result.metrics().to_pandas()
"""

from __future__ import annotations

import asyncio
import json
import os
import threading
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
from ray.exceptions import RayError

from common.config.sections import Config
from common.errors import RunError, StallError, UserError
from common.record.metrics import read_metrics
from common.supervision.stacks import stall_report
from deploy.command.presets import load
from deploy.run.coordinator import Run
from deploy.run.directory import RunDirectory, explained
from deploy.run.metric_sinks import check_sinks
from deploy.run.mirror import Mirror
from deploy.run.preemption import Preemption
from deploy.run.restart_budget import RestartBudget, is_recoverable
from deploy.run.service import Service

T = TypeVar("T")


@dataclass(frozen=True)
class Result:
    """What a run left behind."""

    path: Path
    """The run directory."""
    final: dict[str, float]
    """The last step's metrics."""

    def metrics(self) -> pa.Table:
        """The records of metrics.jsonl: a row a step, a column a metric, null where none is."""
        records = read_metrics(self.path / "metrics.jsonl")
        columns = dict.fromkeys(key for record in records for key in record)
        return pa.table({key: [record.get(key) for record in records] for key in columns})


def train(config: Config | str | Path, **overrides: object) -> Result:
    """Run to the end. From a notebook too: where an event loop runs, a thread has one of its own.

    Args:
        config: a checked configuration, or the YAML file of one.
        overrides: of a file: `steps=20, **{"batch.group_size": 4}`.

    Raises:
        UserError: wrong input. RunError: the run cannot go on; its cause is the message.
        KeyboardInterrupt: after everything was ended and the run directory closed.
    """
    if not isinstance(config, Config):
        words = [f"{key}={_as_yaml(value)}" for key, value in overrides.items()]
        config = load(Path(config), words)
    elif overrides:
        raise UserError(
            f"train() got a Config and the overrides {', '.join(overrides)}: give the path of a "
            "YAML file with overrides, or a Config that has them"
        )
    return train_each([config])[0]


def _as_yaml(value: object) -> str:
    """JSON is YAML; a text that is none stays as it is, as on a command line."""
    return os.fspath(value) if isinstance(value, str | Path) else json.dumps(value)


def train_each(configs: Sequence[Config]) -> list[Result]:
    """One run after the other in the same processes; the results in order.

    Raises as `train` does, at the first run that fails; `UserError` too when a run needs other
    actors than the first (see `Service.open`).
    """
    for config in configs:
        check_sinks(config.metrics)
    return _run_to_end(_train_each(configs))


def _run_to_end(main: Coroutine[Any, Any, T]) -> T:
    """The result of `main` in an event loop of its own; in a thread where one runs already.

    Ctrl-C cancels `main` and is raised when that has ended, as by `asyncio.run`.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(main)
    return _in_thread(main)


def _in_thread(main: Coroutine[Any, Any, T]) -> T:
    outcome, errors = list[T](), list[BaseException]()
    tasks: list[asyncio.Task[Any]] = []
    # Not `Thread.join`, which holds a thread for ended when Ctrl-C interrupts it.
    began, ended = threading.Event(), threading.Event()

    async def watched() -> T:
        task = asyncio.current_task()
        assert task is not None
        tasks.append(task)
        began.set()
        return await main

    def run() -> None:
        try:
            outcome.append(asyncio.run(watched()))
        except BaseException as error:  # handed to the caller's thread, which raises it
            errors.append(error)
        finally:
            began.set()
            ended.set()

    threading.Thread(target=run, name="train").start()
    try:
        ended.wait()
    except KeyboardInterrupt:
        began.wait()
        for task in tasks:
            if not ended.is_set():
                task.get_loop().call_soon_threadsafe(task.cancel)
        ended.wait()  # whatever a run waits for at its end has a deadline
        raise
    if errors:
        raise errors[0]
    return outcome[0]


async def _train_each(configs: Sequence[Config]) -> list[Result]:
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
) -> Result:
    """A run in its directory, through the deaths of its processes."""
    automatic, config = config.resume == "auto", found(config)
    run = RunDirectory.reopen(config.resume) if config.resume else RunDirectory.create(config)
    restarts = RestartBudget(config.restart)
    try:
        if automatic and config.resume and is_done(run, config.steps):
            if last:
                await service.end(run.path / "log")
            return await _done(config, run)
        while True:
            try:
                final = await _attempt(config, run, service, preemption, restarts, last=last)
                return Result(run.path, final)
            except Exception as error:
                if not is_recoverable(error):
                    raise
                if is_done(run, config.steps):  # it failed behind its last checkpoint
                    print(_explained(error, run), flush=True)
                    return await _done(config, run)
                wait_s = restarts.after(error, last_step(run))
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


async def _done(config: Config, run: RunDirectory) -> Result:
    """A run that has its last checkpoint and its last record; its copy is brought up to date."""
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
    return Result(run.path, read_metrics(run.path / "metrics.jsonl")[-1])


def last_step(run: RunDirectory) -> int:
    """The last step on record; 0 before any."""
    path = run.path / "metrics.jsonl"
    records = read_metrics(path) if path.is_file() else []
    return int(records[-1]["step"]) if records else 0


def is_done(run: RunDirectory, steps: int) -> bool:
    """Whether a whole checkpoint of the last step is there; one that has none is not read."""
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


async def _attempt(
    config: Config,
    run: RunDirectory,
    service: Service,
    preemption: Preemption,
    restarts: RestartBudget,
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
    logs = run.path / "log"
    return explained(error, logs, f"Logs of all processes: {logs}")
