"""`grpo-lambda values`: what each prompt is worth to a reference policy, as a column of its data.

    V(q) = β log mean_k exp(r_k / β) over K answers of the reference to q

A*-PO (arXiv 2505.20686) takes that off the reward, so that one answer a prompt is enough to train
on. β to infinity is the mean reward, β to 0 that of the best answer. Answers without a verdict are
in no mean.

FOLDER/data.jsonl     the rows with their value, written last; the rows held out stand at the end,
                      so that a run on the file holds out the same
      /settings.json, trajectories/, failures.json, log/, config.yaml as in `deploy.eval.launch`
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from actors.data.prompts import Prompt
from actors.data.schemas import Row
from common.config.bounds import above, at_least
from common.config.data import DataConfig
from common.config.sections import Config
from common.errors import RunError, UserError
from deploy.eval.launch import FAILURES, Job, Notify, open_folder, sample_all
from deploy.eval.runner import logged, logged_rewards
from deploy.eval.settings import EvaluationConfig, Sampling, sampled_by, sampling_config
from deploy.models.resolve import resolve_model
from deploy.placement.options import with_compute_dtype
from deploy.run.display import PlainDisplay
from deploy.run.inputs import find_prompts
from deploy.run.settled import settled

DATA = "data.jsonl"
_OURS = ("prompt", "answer", "messages")
"""Columns of a reference that are written under the names of the data set."""


@dataclass(frozen=True)
class ValueOptions:
    """One call of `grpo-lambda values`."""

    config: Config
    """Configuration of the training: its data, model, template, rules and lengths."""
    out: Path
    samples: int = 8
    beta: float = 0.5
    column: str = "v"
    dry_run: bool = False
    """Whether to stop behind the cost."""


def soft_value(rewards: Sequence[float], beta: float) -> float:
    """The soft value β log mean exp(r / β); no exponential is larger than 1."""
    best = max(rewards)
    mean = sum(math.exp((reward - best) / beta) for reward in rewards) / len(rewards)
    return best + beta * math.log(mean)


def make_values(options: ValueOptions) -> Path | None:
    """Sample what is missing and write the file of rows; None behind the cost alone.

    Raises:
        UserError: wrong input, or a folder of other settings. RunError: it cannot go on; call
            again to go on with what is missing.
    """
    notify = PlainDisplay(0).event
    config = settled(options.config, notify)
    _check(options, config)
    folder = resolve_model(config.model.path)
    source = find_prompts(config, str(folder), notify)
    rows = [*source.rows.held_out, *source.rows.train]
    _check_column(options.column, rows)
    prompts = source.some_prompts(len(rows))
    given = replace(config.model, path=str(folder))
    own = sampling_config(with_compute_dtype(replace(config, model=given)))
    generator = own.generator
    sampling = Sampling(
        options.samples, generator.temperature, generator.max_completion_tokens, own.seed
    )
    notify(cost(prompts, sampling))
    if options.dry_run:
        return None
    job = _open(options, config, own, sampling, prompts, rows, notify)
    try:
        if job.missing:
            sample_all([job], notify)
        return _write(options, config.data, job, rows, len(source.rows.held_out), notify)
    finally:
        job.run.release()


def _check(options: ValueOptions, config: Config) -> None:
    """Raise `UserError` for what cannot be asked for."""
    for option, number, bound in (
        ("--samples", options.samples, at_least(1)),
        ("--beta", options.beta, above(0)),
    ):
        if number not in bound:
            raise UserError(f"{option} {number} must be {bound}")
    if len(config.data.each) > 1:
        raise UserError(
            "values are made for one data set at a time: call once for each of data.sources, by "
            "data.path, and give data.sources the files that are made"
        )
    for rule in config.verifier.rules:
        if rule.name == "column" and rule.args.get("name") == options.column:
            raise UserError(
                f"verifier.rules has the rule column of {options.column!r}, which is what is made "
                "here: leave the rule out, and give it to the training"
            )


def _check_column(column: str, rows: Sequence[Row]) -> None:
    for row in rows:
        if column in json.loads(row.reference):
            raise UserError(f"{row.place} has a column {column!r}: choose another --column")


def cost(prompts: Sequence[Prompt], sampling: Sampling) -> str:
    """What sampling all of it takes, at most."""
    answers = len(prompts) * sampling.samples
    read = sampling.samples * sum(len(prompt.token_ids) for prompt in prompts)
    return (
        f"{len(prompts):,} prompts x {sampling.samples} answers = {answers:,} answers: at most "
        f"{answers * sampling.max_tokens:,} sampled tokens, and {read:,} tokens of prompts read"
    )


def _open(
    options: ValueOptions,
    config: Config,
    own: EvaluationConfig,
    sampling: Sampling,
    prompts: list[Prompt],
    rows: Sequence[Row],
    notify: Notify,
) -> Job:
    rules = [asdict(rule) for rule in own.verifier.rules]
    settings = {
        "values": {"rules": rules, "max_length": own.model.max_length},
        **sampled_by(config.model.path, sampling, rows, own),
    }
    run = open_folder(options.out, own, settings)
    there = logged(run.path / "trajectories")
    total = len(prompts) * sampling.samples
    notify(f"{len(there):,} of {total:,} answers are in {run.path} already")
    missing = [number for number in range(total) if number not in there]
    return Job("values", sampling, prompts, own, settings, run, missing)


def _write(
    options: ValueOptions,
    data: DataConfig,
    job: Job,
    rows: Sequence[Row],
    held_out: int,
    notify: Notify,
) -> Path:
    """The rows of training, then those held out, each with its value; those without are counted."""
    rewards = judged_rewards(job)
    values = [soft_value(some, options.beta) if some else None for some in rewards]
    records = [
        record_of(row, data) | {options.column: value}
        for row, value in zip(rows, values, strict=True)
        if value is not None
    ]
    if without := values.count(None):
        notify(
            f"{without} rows have no answer that could be judged, and are left out "
            f"({job.run.path / FAILURES} says why)"
        )
    if not records:
        raise RunError(f"no row has a value: see {job.run.path / FAILURES}")
    held = sum(value is not None for value in values[:held_out])
    path = job.run.path / DATA
    partial = path.with_suffix(".partial")
    lines = (json.dumps(record) + "\n" for record in [*records[held:], *records[:held]])
    partial.write_text("".join(lines), encoding="utf-8")
    os.replace(partial, path)
    known = [value for value in values if value is not None]
    notify(
        f"values of {len(records):,} rows: {sum(known) / len(known):.3f} on average, "
        f"{min(known):.3f} to {max(known):.3f}\n{_how_to_train(options, data, job, path)}"
    )
    return path


def judged_rewards(job: Job) -> list[list[float]]:
    """The rewards of each prompt's answers, in the order of its samples; those without are not in.

    Raises: `RunError` when an answer is missing.
    """
    found = logged_rewards(job.run.path / "trajectories")
    count = job.sampling.samples
    total = len(job.prompts) * count
    if missing := total - len(found):
        raise RunError(f"{missing} answers are not in {job.run.path}: call again to go on")
    rewards = [found[number] for number in range(total)]
    return [
        [reward for reward in rewards[first : first + count] if reward is not None]
        for first in range(0, total, count)
    ]


def record_of(row: Row, data: DataConfig) -> dict[str, Any]:
    """The row as a data set has it, so that reading it gives the same row."""
    reference = json.loads(row.reference)
    record: dict[str, Any] = {
        data.prompt_column or "prompt": row.conversation if row.messages else row.question
    }
    if reference["answer"] is not None:
        record[data.answer_column or "answer"] = reference["answer"]
    beside = {key: value for key, value in reference.items() if key not in _OURS}
    return {key: value for key, value in beside.items() if value is not None} | record


def _how_to_train(options: ValueOptions, data: DataConfig, job: Job, path: Path) -> str:
    own = job.config.verifier.rules
    rules = [
        {"name": rule.name, "weight": rule.weight, "args": rule.args}
        for rule in own
        if rule.name != "reasoning_gym"
    ]
    column = {"name": "column", "weight": -1, "args": {"name": options.column}}
    return (
        f"train with recipe=a_star_po batch.group_size=1 data.source=file data.path={path} "
        f"verifier.rules='{json.dumps([*rules, column])}'"
        + (" data.eval_path=null" if data.eval_path is not None else "")
        + (
            "; put a rule before it that judges these answers: reasoning_gym, which judged them "
            "here, judges its own tasks only, and these come from a file then"
            if len(rules) < len(own)
            else ""
        )
    )
