"""`grpo-lambda eval`: suites one after the other through one set of generators.

Suites of another environment have generators of their own.

Everything that can be wrong with the input is found before a process starts. What is in a folder
already is not sampled again, and a folder that is done starts nothing.

FOLDER/config.yaml          configuration of the parts
      /settings.json        what decides the results: a second call must have the same
      /trajectories/        every sample as training logs it (`common.record.trajectory_log`)
      /completions.parquet  every sample for reading: prompt, completion, answer, verdict
      /results.json         the numbers, written last
      /failures.json        why the grader could not judge, and how often
      /log/                 what every process printed
"""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from ray.exceptions import RayError

from actors.data.chat import Template
from actors.data.prompts import Prompt, PromptSource
from actors.data.schemas import Row
from actors.data.sources import Rows
from actors.environments.check import environment_tools, inspect_environment
from actors.rollout.episodes import Episodes
from actors.rollout.pools import GeneratorPool, VerifierPool, start_generators, warm_up_verifiers
from common.config.load import dump_config
from common.errors import RunError, UserError
from common.record.writer import TrajectoryLogClient
from common.supervision.heartbeat import beat
from common.supervision.loops import first_cause, until_it_ends
from deploy.eval import report
from deploy.eval.runner import Start, SuiteRunner, logged
from deploy.eval.settings import (
    EvaluationConfig,
    Options,
    Sampling,
    context_length,
    differences,
    evaluation_config,
    for_suite,
    sampling_of,
    settings_of,
)
from deploy.eval.suite import Suite, load_problems, load_suite
from deploy.models.resolve import ModelLocation, check_vocabulary, resolve_model
from deploy.placement.options import with_compute_dtype
from deploy.placement.walls import walls_there
from deploy.run.actors import Actors, start_log
from deploy.run.directory import RunDirectory, explained
from deploy.run.display import PlainDisplay
from deploy.run.preemption import Preemption
from deploy.run.replacements import Replacements
from deploy.run.restart_budget import RestartBudget
from deploy.run.service import Service

SETTINGS, FAILURES = "settings.json", "failures.json"
_SHOW_S = 10.0

Notify = Callable[[str], None]


@dataclass(frozen=True)
class Job:
    """Questions ready to be sampled. `missing`: numbers of samples, see `deploy.eval.runner`."""

    name: str
    sampling: Sampling
    prompts: list[Prompt]
    config: EvaluationConfig
    settings: dict[str, Any]
    run: RunDirectory
    missing: list[int]
    starts: Sequence[Start] = ()
    """What the samples of each prompt go on from; nothing: from the prompt."""
    seconds: float = math.inf
    """After which no further sample is begun."""


def evaluate(options: Options) -> list[dict[str, Any]]:
    """Every suite to its end; what each results.json holds, in order.

    Raises:
        UserError: wrong input, or a folder of other settings. RunError: it cannot go on; call
            again to go on with what is missing.
    """
    notify = PlainDisplay(0).event
    jobs: list[Job] = []
    try:
        jobs += _prepare(options, notify)
        if any(job.missing for job in jobs):
            sample_all([job for job in jobs if job.missing], notify)
        return [_finish(job) for job in jobs]
    finally:
        for job in jobs:
            job.run.release()


def _prepare(options: Options, notify: Notify) -> list[Job]:
    """Check all suites, then open their folders."""
    from transformers import AutoTokenizer

    if options.data is not None and len(options.suites) > 1:
        raise UserError("--data is one suite's file: name one --suite")
    suites = [load_suite(name) for name in options.suites]
    if len({suite.name for suite in suites}) != len(suites):
        raise UserError("each suite has a folder of its name: give no --suite twice")
    bases = [evaluation_config(options, suite) for suite in suites]
    samplings = [
        sampling_of(options, suite, base.seed) for suite, base in zip(suites, bases, strict=True)
    ]
    rows = [load_problems(suite, options.data, options.limit) for suite in suites]
    folder = resolve_model(options.model)
    trusted = bases[0].model.trust_remote_code
    tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=trusted)
    check_vocabulary(tokenizer.get_vocab().values(), folder)
    prompts = [
        _prompts(base, each, tokenizer, notify) for base, each in zip(bases, rows, strict=True)
    ]
    needed = max(
        max(len(prompt.token_ids) for prompt in some) + sampling.max_tokens
        for some, sampling in zip(prompts, samplings, strict=True)
    )
    length = context_length(folder, needed)
    jobs: list[Job] = []
    try:
        for suite, sampling, some, each, base in zip(
            suites, samplings, prompts, rows, bases, strict=True
        ):
            model = replace(base.model, path=str(folder), max_length=length)
            config = for_suite(with_compute_dtype(replace(base, model=model)), suite, sampling)
            settings = settings_of(options, suite, sampling, each, config)
            jobs.append(_open(options, suite, sampling, some, config, settings, notify))
    except BaseException:
        for job in jobs:
            job.run.release()
        raise
    return jobs


def _prompts(
    config: EvaluationConfig, rows: list[Row], tokenizer: Any, notify: Notify
) -> list[Prompt]:
    """The questions as the policy reads them, told of the tools of an environment.

    Raises: `UserError` for an environment that cannot begin an episode of the first question.
    """
    template = Template(config.data, tokenizer, environment_tools(config.environment))
    for note in inspect_environment(config.environment, json.loads(rows[0].reference)).notes:
        notify(note)
    return PromptSource(Rows([], rows, 0), template, 0, "sequential").eval_prompts(len(rows))


def _open(
    options: Options,
    suite: Suite,
    sampling: Sampling,
    prompts: list[Prompt],
    config: EvaluationConfig,
    settings: dict[str, Any],
    notify: Notify,
) -> Job:
    path = folder_of(options, suite.name)
    run = open_folder(path, config, settings)
    total = len(prompts) * sampling.samples
    there = logged(path / "trajectories")
    missing = [number for number in range(total) if number not in there]
    done = total - len(missing)
    notify(f"{suite.name}: {total} samples, {done} of them in {path} already")
    return Job(suite.name, sampling, prompts, config, settings, run, missing)


def folder_of(options: Options, suite: str) -> Path:
    """`--out`, with a folder for each of several suites in it; else runs/eval-MODEL-SUITE."""
    if options.out is not None:
        return options.out if len(options.suites) == 1 else options.out / suite
    model = "".join(c if c.isalnum() or c in "._-" else "-" for c in options.model.rstrip("/"))
    return Path("runs") / f"eval-{model.strip('-.')}-{suite}"


def open_folder(path: Path, config: EvaluationConfig, settings: dict[str, Any]) -> RunDirectory:
    """A new folder, or one of the same settings, locked for this process.

    Raises: `UserError` when it holds something else, or another process is at work in it.
    """
    if not path.exists():
        run = _new_folder(path, config)
        (path / SETTINGS).write_text(json.dumps(settings, indent=1))
        return run
    if not (path / SETTINGS).is_file() or not (path / "config.yaml").is_file():
        raise UserError(f"{path} exists and is no evaluation: choose another --out")
    run = RunDirectory.reopen(str(path))
    stored = json.loads((path / SETTINGS).read_text())
    # As JSON, in which a tuple is a list.
    found = differences(stored, json.loads(json.dumps(settings)))
    if found:
        run.release()
        raise UserError(
            f"{path} is an evaluation with other settings:\n  "
            + "\n  ".join(found)
            + "\nGive the same settings to go on with it, or choose another --out"
        )
    return run


def _new_folder(path: Path, config: EvaluationConfig) -> RunDirectory:
    try:
        return RunDirectory.make(path, dump_config(config))
    except OSError as error:
        raise UserError(
            f"cannot write to {path}: {error.strerror}; choose another --out"
        ) from error


def sample_all(jobs: list[Job], notify: Notify) -> None:
    """Sample what is missing of each job, through one service for each environment.

    Raises: as `evaluate`.
    """
    environments = [job.config.environment for job in jobs]
    for place, environment in enumerate(environments):
        if environment in environments[:place]:
            continue
        same = [job for job in jobs if job.config.environment == environment]
        log_folder = same[0].run.path / "log"
        try:
            asyncio.run(_sample(same, log_folder, notify))
        except ExceptionGroup as group:
            raise _explained(first_cause(group), log_folder) from group
        except (RayError, RunError) as error:
            raise _explained(error, log_folder) from error


async def _sample(jobs: list[Job], log_folder: Path, notify: Notify) -> None:
    task = asyncio.current_task()
    assert task is not None
    preemption, service, first = Preemption(task, 0.0), Service(), jobs[0]
    try:
        origin = ModelLocation(first.settings["model"], first.config.model.path)
        actors, _ = await service.open(first.config, None, 0, origin, notify)
        preemption.listen()
        deadline_s = first.config.generator.start_timeout_s
        await start_generators(actors.generators, service.waits, deadline_s)
        restarts = RestartBudget(first.config.restart)
        replacement = Replacements(service.factory, first.run, restarts, notify).generators()
        async with GeneratorPool(actors.generators, service.waits, 0, replacement) as generators:
            for job in jobs:
                if job is not first:
                    actors = await service.change_verifiers(job.config.verifier)
                replacements = Replacements(service.factory, job.run, restarts, notify)
                await _sample_suite(job, service, actors, generators, replacements, notify)
    finally:
        await service.end(log_folder)


async def _sample_suite(
    job: Job,
    service: Service,
    actors: Actors,
    generators: GeneratorPool,
    replacements: Replacements,
    notify: Notify,
) -> None:
    config, waits = job.config, service.waits
    found = await warm_up_verifiers(actors.verifiers, waits, config.generator.start_timeout_s)
    if config.ray.address != "local":  # else it was said before anything started
        for line in walls_there(found):
            notify(line)
    writer = start_log(config.verifier, job.run.path)
    log = TrajectoryLogClient(writer, waits, config.verify_timeout_s, replacements.log())
    try:
        async with VerifierPool(actors.verifiers, waits, replacements.verifiers()) as verifiers:
            episodes = Episodes(
                generators,
                verifiers,
                sample_timeout_s=config.generator.group_timeout_s,
                judge_timeout_s=config.verify_timeout_s,
            )
            runner = SuiteRunner(
                job.prompts,
                job.sampling,
                episodes=episodes,
                log=log,
                in_flight=config.in_flight,
                progress=_Progress(job, notify),
                starts=job.starts,
                seconds=job.seconds,
            )
            silence_s = config.restart.silence_s
            asks = [partial(part.ping, silence_s) for part in (generators, verifiers, log)]
            await until_it_ends(runner.run(job.missing), beat(config.restart.heartbeat_s, asks))
            _add_failures(job.run.path / FAILURES, await episodes.failures())
    finally:
        await service.end_run(log.writer)


class _Progress:
    """Says how far a suite is, not more often than every ten seconds."""

    def __init__(self, job: Job, notify: Notify) -> None:
        self._job, self._notify = job, notify
        self._total = len(job.prompts) * job.sampling.samples
        self._before = self._total - len(job.missing)
        self._said_s = time.monotonic()

    def __call__(self, done: int) -> None:
        now, count = time.monotonic(), self._before + done
        if count == self._total or now - self._said_s >= _SHOW_S:
            self._said_s = now
            self._notify(f"{self._job.name}: {count} of {self._total} samples")


def _add_failures(path: Path, reasons: Counter[str]) -> None:
    """To those of the calls before this one."""
    if path.is_file():
        reasons = reasons + Counter(json.loads(path.read_text()))
    if reasons:
        path.write_text(json.dumps(dict(reasons), indent=1))


def _finish(job: Job) -> dict[str, Any]:
    """The numbers of a suite whose samples are all there, printed; written where they are not."""
    path = job.run.path
    if job.missing or not (path / report.RESULTS).is_file():
        failures = path / FAILURES
        reasons = json.loads(failures.read_text()) if failures.is_file() else {}
        (grader,) = job.config.verifier.rules
        samples = report.collect(
            path / "trajectories", len(job.prompts), job.sampling.samples, grader
        )
        report.write(path, samples, report.results_of(samples, job.settings, reasons))
    results: dict[str, Any] = json.loads((path / report.RESULTS).read_text())
    print(f"\n{report.table(results)}\n  {path / report.RESULTS}", flush=True)
    return results


def _explained(error: BaseException, log_folder: Path) -> BaseException:
    """With what the processes said last, and how to go on, where the user cannot know."""
    if isinstance(error, UserError) or not isinstance(error, (RunError, RayError)):
        return error  # wrong input, which an actor may have met, or a defect of ours
    advice = "Call again to go on; what is logged is not lost"
    return RunError(explained(error, log_folder, advice))
