"""`grpo-lambda replay RUN --step N` computes a learner step again, from the log and a checkpoint.

The policy before step N is that of the newest checkpoint behind it, trained on through the steps
between from the trajectory log. On the machine of the run, with as many threads, every number comes
out bitwise; elsewhere it differs by rounding. Another credit rule is shown what it would have done:
the same policy and completions, its advantages and its first gradient, which is not taken.
"""

from __future__ import annotations

import math
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from common.config.algorithm import AdvantageConfig, AlgorithmConfig
from common.config.load import dump_config, load_config
from common.config.sections import Config, TeacherConfig
from common.errors import UserError
from common.record.credit_log import credit_path, read_credit, read_scores, write_credit
from common.record.ledger import reading
from common.record.metrics import read_metrics
from common.record.parts import learnt
from common.record.pruned import pruned_tokens
from common.record.trajectory_log import read_log
from deploy.models.resolve import ModelLocation, resolve_model
from deploy.placement.options import plan_here, uses_cuda, with_compute_dtype
from deploy.run.actors import learner_job
from deploy.run.directory import LEDGER, RunDirectory
from learner.algorithm.recipe import Recipe
from learner.algorithm.recipe_checks import check_recipe
from learner.policy.step_batch import StepBatch
from learner.training.batch_checks import check_staleness
from learner.training.credit_sheet import CreditSheet
from learner.training.rank import LearnerRank
from learner.training.trainer import Trainer

Batches = list[pa.RecordBatch]


@dataclass(frozen=True)
class Difference:
    """A number on record that came out differently in the replay."""

    name: str
    recorded: float
    replayed: float

    @property
    def relative(self) -> float:
        if not (math.isfinite(self.recorded) and math.isfinite(self.replayed)):
            return math.inf
        size = max(abs(self.recorded), abs(self.replayed))
        return abs(self.recorded - self.replayed) / size if size else 0.0


@dataclass(frozen=True)
class Replay:
    """One learner step computed again, compared with the record of the run."""

    step: int
    from_step: int
    """Step of the checkpoint that the replay began from."""
    ranks: int
    """Learner ranks of the run. The replay has one."""
    metrics: dict[str, float]
    compared: int
    """Numbers of the record that were compared."""
    differences: list[Difference]
    credit: pa.Table
    others: list[OtherRule]
    """Other rules, as they were asked for."""

    @property
    def other(self) -> OtherRule | None:
        """The first of the other rules; None where none was asked for."""
        return self.others[0] if self.others else None


@dataclass(frozen=True)
class OtherRule:
    """What another credit rule would have done with the same completions."""

    name: str
    metrics: dict[str, float]
    credit: pa.Table
    logged: Path
    """The file with this rule's credit, beside that of the run."""


def replay(run: Path, step: int, *others: tuple[str, Config]) -> Replay:
    """Compute `step` of the run directory `run` again.

    Args:
        others: name and configuration of rules to judge by the same policy and completions; their
            credit is kept beside that of the run.

    Raises:
        UserError: there is no such step, or its data or a checkpoint behind it are gone.
    """
    config = with_compute_dtype(run_config(run))
    record = _record(run, step)
    directory = RunDirectory(run)
    first = directory.newest_checkpoint(print, before=step)
    batches = step_batches(run, range(first + 1, step + 1))
    staleness, sheet = config.generator.max_staleness, CreditSheet()
    with policy_at(config, directory.checkpoint(first) if first else None) as learner:
        for earlier in range(first + 1, step):
            known = _scores(run, earlier, config, batches[earlier])
            learner.step(batches[earlier], earlier - 1, staleness, scores=known)
        scores = _scores(run, step, config, batches[step])
        batch = StepBatch.from_record_batches(batches[step])
        if scores is not None:
            batch = replace(batch, scores=np.concatenate(scores))
        judged = [
            _judge(learner.trainer, batch, batches[step], run, step, other) for other in others
        ]
        found = check_staleness(batch, step - 1, staleness) | learner.trainer.train(batch, sheet)
        credit = _table(sheet, step, batches[step])
    found = {name: value for name, value in found.items() if not name.startswith("time/")}
    pairs = _pairs(record, found)
    if credit_path(run, step).is_file():
        pairs |= _credit_pairs(read_credit(run, step), credit)
    wrong = [Difference(name, *pair) for name, pair in pairs.items() if not _same(*pair)]
    return Replay(step, first, config.learner.ranks, found, len(pairs), wrong, credit, judged)


def write_policy(run: Path, version: int, folder: Path) -> Path:
    """A model folder with the policy of `version`: a checkpoint, or one made in `folder`.

    What has no checkpoint is trained again, from the newest behind it and the trajectory log.

    Raises:
        UserError: the data between are gone.
    """
    config, directory = with_compute_dtype(run_config(run)), RunDirectory(run)
    first = directory.newest_checkpoint(print, before=version + 1)
    if version == 0:
        return resolve_model(config.model.path)
    if first == version:
        return directory.checkpoint(version)
    batches = step_batches(run, range(first + 1, version + 1))
    with policy_at(config, directory.checkpoint(first) if first else None) as learner:
        for step, groups in batches.items():
            known = _scores(run, step, config, groups)
            learner.step(groups, step - 1, config.generator.max_staleness, scores=known)
        learner.take_checkpoint({})
        learner.write_checkpoint(str(folder))
    return folder


def other_rule(run: Path, overrides: Sequence[str], recipes: Path) -> tuple[str, Config]:
    """Name and configuration of the rule that `overrides` describe.

    `recipe=NAME` starts from the defaults, other keys from the rule of the run.

    Raises:
        UserError: as `load_config`, and for keys that are no credit rule's.
    """
    odd = [o for o in overrides if not o.startswith(("recipe=", "algorithm."))]
    if odd:
        raise UserError(f"{odd[0]}: another rule is recipe=NAME and keys of algorithm. only")
    config = replace(run_config(run), teacher=TeacherConfig())  # what it said is on record
    named = [o.partition("=")[2] for o in overrides if o.startswith("recipe=")]
    if named:
        config = replace(config, recipe=None, algorithm=AlgorithmConfig())
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(dump_config(config))
        file.flush()
        config = load_config([Path(file.name)], overrides, recipes, resolved=True)
    check_recipe(config.algorithm, config.correction_kind)
    parts = [Path(name).stem for name in named] + [
        o.removeprefix("algorithm.") for o in overrides if not o.startswith("recipe=")
    ]
    return re.sub(r"[^\w.=-]+", "_", ",".join(parts)), config


def step_batches(run: Path, steps: Sequence[int]) -> dict[int, Batches]:
    """What the learner got of each step's groups, in the order in which it took them.

    Raises:
        UserError: a step was not trained, or a group of it is not in the trajectory log.
    """
    with reading(run / LEDGER) as db:
        rows = db.execute(
            "SELECT group_id, step FROM groups WHERE step BETWEEN ? AND ?", (steps[0], steps[-1])
        )
        step_of = dict(rows.fetchall())
    if missing := set(steps) - set(step_of.values()):
        raise UserError(f"{run}: the ledger has no group that trained in step {min(missing)}")
    found: dict[int, dict[int, pa.RecordBatch]] = {step: {} for step in steps}
    for batch in read_log(run / "trajectories"):
        group_id = batch.column("group_id")[0].as_py()
        if group_id in step_of:
            found[step_of[group_id]][group_id] = learnt(batch)
    lost = set(step_of) - {group_id for groups in found.values() for group_id in groups}
    if lost:
        gone = "not in the log: put the missing segment back"
        if min(lost) in pruned_tokens(run / LEDGER):
            gone = "pruned from the log: take a step behind those that were pruned"
        raise UserError(
            f"{run / 'trajectories'}: group {min(lost)}, trained in step {step_of[min(lost)]}, "
            f"is {gone}"
        )
    return {step: sorted(groups.values(), key=_place) for step, groups in found.items()}


def _scores(
    run: Path, step: int, config: Config, groups: Batches
) -> list[npt.NDArray[np.float32]] | None:
    """What the scorer of the run said of each completion of `step`; None where nobody scored."""
    if config.algorithm.advantage.scorer is None:
        return None
    found = read_scores(run, step)
    names = ("group_id", "completion_index")
    keys = [
        key
        for group in groups
        for key in zip(*(group.column(name).to_pylist() for name in names), strict=True)
    ]
    return [found[key] for key in keys]


def _place(batch: pa.RecordBatch) -> tuple[int, int]:
    """Sorting key for the order in which the learner takes groups (`common.budget`)."""
    first = {name: batch.column(name)[0].as_py() for name in ("dispatch_version", "ticket")}
    return first["dispatch_version"], first["ticket"]


def run_config(run: Path) -> Config:
    """The configuration of a run, as it was resolved when the run began.

    Raises: `UserError` where there is no run.
    """
    path = run / "config.yaml"
    if not path.is_file():
        raise UserError(f"{run}: there is no run (no config.yaml) in this folder")
    return load_config([path], [], resolved=True)


def _record(run: Path, step: int) -> Mapping[str, float]:
    records = {int(record["step"]): record for record in read_metrics(run / "metrics.jsonl")}
    if step < 1 or step not in records:
        last = max(records, default=0)
        raise UserError(f"--step {step}: {run} has steps 1 to {last} on record")
    return records[step]


@contextmanager
def policy_at(config: Config, checkpoint: Path | None) -> Iterator[LearnerRank]:
    """One rank in this process, with the policy and optimiser of a checkpoint.

    Args:
        checkpoint: None: those that the run began with.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()
    origin = ModelLocation(config.model.path, str(resolve_model(config.model.path)))
    folder = str(checkpoint or origin.folder)
    threads = plan_here(config, []).learner_threads
    offload = config.learner.activation_offload and uses_cuda(config)  # it changes no number
    torch.set_num_threads(threads)
    alone = replace(
        config,
        model=replace(config.model, path=folder),
        learner=replace(config.learner, ranks=1, threads=threads, activation_offload=offload),
        teacher=TeacherConfig(),  # its scores are on record
    )
    learner = LearnerRank(learner_job(alone, origin, scores_on_record=True), rank=0)
    try:
        learner.setup(*learner.rendezvous_address())
        if checkpoint is not None:
            learner.load_checkpoint(folder)
        yield learner
    finally:
        learner.shutdown()


def _judge(
    trainer: Trainer,
    batch: StepBatch,
    groups: Batches,
    run: Path,
    step: int,
    other: tuple[str, Config],
) -> OtherRule:
    name, config = other
    length = config.generator.max_completion_tokens
    recipe = Recipe(config.algorithm, config.correction_kind, length)
    sheet = CreditSheet()
    if _read(config.algorithm.advantage) != _read(trainer.recipe.advantage):
        batch = replace(batch, scores=None)  # they are another's
    metrics = replace(trainer, recipe=recipe).probe(batch, sheet)
    credit = _table(sheet, step, groups)
    write_credit(run, step, credit.combine_chunks().to_batches()[0], name)
    return OtherRule(name, metrics, credit, credit_path(run, step, name))


def _read(advantage: AdvantageConfig) -> tuple[object, ...]:
    """Who scored, and what it read: what makes scores those of a rule."""
    read = (advantage.context, advantage.context_template, advantage.sibling_reward)
    return (advantage.scorer, *read, advantage.ema_rate, advantage.ema_sync_steps)


def _table(sheet: CreditSheet, step: int, groups: Batches) -> pa.Table:
    rows = sheet.record_batch(step, groups)
    assert rows is not None  # the only rank
    return pa.Table.from_batches([rows])


def _pairs(
    record: Mapping[str, float], found: Mapping[str, float]
) -> dict[str, tuple[float, float]]:
    """Pairs of numbers that both have. A null on record was not finite."""
    return {
        name: (math.nan if record[name] is None else record[name], value)
        for name, value in found.items()
        if name in record
    }


def _credit_pairs(recorded: pa.Table, found: pa.Table) -> dict[str, tuple[float, float]]:
    """A pair of numbers for each column of the credit log: the first that differs, if any does."""
    pairs = {}
    names = ["reward", "advantage", "token_weight", "trace_weights", "advantages", "logprobs"]
    if recorded.column("values").null_count < recorded.num_rows:  # older logs have none
        names.append("values")
    for name in names:
        mine, theirs = (_numbers(table.column(name)) for table in (recorded, found))
        if len(mine) != len(theirs):
            pairs[f"credit/{name}, how many"] = (float(len(mine)), float(len(theirs)))
            continue
        apart = np.flatnonzero((mine != theirs) & ~(np.isnan(mine) & np.isnan(theirs)))
        at = apart[0] if len(apart) else 0
        if len(mine):
            pairs[f"credit/{name}"] = (float(mine[at]), float(theirs[at]))
    return pairs


def _numbers(column: pa.ChunkedArray) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    flat = column.combine_chunks()
    flat = flat.flatten() if pa.types.is_list(flat.type) else flat
    return np.asarray(flat.to_numpy(zero_copy_only=False), np.float64)


def _same(recorded: float, replayed: float) -> bool:
    return recorded == replayed or (math.isnan(recorded) and math.isnan(replayed))
