"""The credit log of a run: what every token of every completion was credited with, step by step.

    runs/NAME/credit/step-000012.arrow       Arrow IPC file (zstd): a row per completion the learner
                                             was given in step 12, in the learner's order
                    /step-000012.RULE.arrow  what another rule would have credited
                    (`deploy.inspector.replay`)

Steps are the numbers of finished learner steps, from 1: the `step` of `metrics.jsonl` and of the
ledger (`Ledger.trained`). Step n starts from weight version n - 1 and makes version n. Not every
step needs a file. A resume removes the files of steps behind its checkpoint.

A row, with T completion tokens (guidance included; the lengths of the trajectory log's lists):

    reward         as the learner used it, null where there is none
    advantage      A, relative to the group; 0 where the completion does not count
    token_weight   w_i, the weight of the completion's tokens in the aggregation
    trained        whether the completion has a part in the loss
    trace_weights  [T] c_t = sum over u of K[u, t], the credit a token gets; NaN outside the loss
    advantages     [T] A c_t, the λ-advantage; NaN outside the loss
    logprobs       [T] the learner's log π of each token before the step, nats

    scores         [T] log π of each token under the recipe's scorer, nats; null where nobody scores
    values         [T] what the critic says of the state before each token, before it learns from
                   the step; null without a critic, and in logs of version 3, which had no values

The first three lists are null when the completion was not run through the learner.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.ipc

from common.errors import UserError, first_line

CREDIT_VERSION = 4
OLDER_VERSIONS = (3,)
"""Versions that are read too: a column that they did not have is null."""
VERSION_KEY = b"grpo_lambda.credit_version"
FOLDER = "credit"

_NAME = re.compile(r"step-(\d{6,})(?:\.(.+))?\.arrow")
_LISTS = ("trace_weights", "advantages", "logprobs")


def credit_schema() -> pa.Schema:
    """Schema of a step's credit, its version in the metadata."""
    fields = [
        pa.field("step", pa.int32(), nullable=False),
        pa.field("group_id", pa.int64(), nullable=False),
        pa.field("ticket", pa.int64(), nullable=False),
        pa.field("completion_index", pa.int32(), nullable=False),
        pa.field("reward", pa.float32()),
        pa.field("advantage", pa.float64(), nullable=False),
        pa.field("token_weight", pa.float64(), nullable=False),
        pa.field("trained", pa.bool_(), nullable=False),
        *(pa.field(name, pa.list_(pa.float32())) for name in (*_LISTS, "scores", "values")),
    ]
    return pa.schema(fields, metadata={VERSION_KEY: str(CREDIT_VERSION).encode()})


def credit_path(run: Path, step: int, rule: str | None = None) -> Path:
    """Where the credit of learner step `step` (from 1) of the run directory `run` is written.

    `rule`: another credit rule that was asked what it would have done; None is the run's own.
    """
    return run / FOLDER / (f"step-{step:06d}.{rule}.arrow" if rule else f"step-{step:06d}.arrow")


def write_credit(run: Path, step: int, batch: pa.RecordBatch, rule: str | None = None) -> None:
    """Write the credit of `step`, aside and renamed: a reader sees all of it or nothing.

    Rows of one group that follow each other become a record batch of their own, so that a reader
    of one group decompresses no other.

    Raises:
        ValueError: `batch` has another schema, rows of another step, or lists of unequal lengths.
        OSError: the disk is full or read-only.
    """
    _check(step, batch)
    path = credit_path(run, step, rule)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".arrow.partial")
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with pa.ipc.new_file(partial, credit_schema(), options=options) as file:
        for start, end in _runs(batch.column("group_id").to_numpy()):
            file.write_batch(batch.slice(start, end - start))
    os.replace(partial, path)


def read_credit(run: Path, step: int, rule: str | None = None) -> pa.Table:
    """The credit of `step`, under another rule if one is named.

    Raises:
        UserError: the step has no credit file, or another release wrote it.
    """
    path = credit_path(run, step, rule)
    with _explained(path), _opened(path) as reader:
        table = _with_all_columns(reader.read_all())
        table.validate(full=True)
        return table


def read_group_credit(run: Path, step: int, group_id: int, rule: str | None = None) -> pa.Table:
    """The rows of one group in `step`, by completion; no row when the step did not have it.

    Raises:
        UserError: the step has no credit file, or another release wrote it.
    """
    path = credit_path(run, step, rule)
    with _explained(path), _opened(path, ["group_id"]) as reader:
        places = [
            index
            for index in range(reader.num_record_batches)
            if group_id in reader.get_batch(index).column(0).to_numpy()
        ]
    with _explained(path), _opened(path) as reader:
        found = [reader.get_batch(index) for index in places]
        table = _with_all_columns(pa.Table.from_batches(found, schema=reader.schema))
        table.validate(full=True)
    table = table.filter(pc.equal(table["group_id"], group_id))
    return table.sort_by("completion_index")


def read_scores(run: Path, step: int) -> dict[tuple[int, int], npt.NDArray[np.float32]]:
    """By (group_id, completion_index), what the scorer of `step` said of every token.

    Raises:
        UserError: the step has no credit file, another release wrote it, or nobody scored it.
    """
    table = read_credit(run, step)
    if table["scores"].null_count:
        raise UserError(f"{credit_path(run, step)}: no scores of a scorer are in it")
    keys = zip(*(table[name].to_pylist() for name in ("group_id", "completion_index")), strict=True)
    lists = [np.asarray(each, np.float32) for each in table["scores"].to_pylist()]
    return dict(zip(keys, lists, strict=True))


def forget_credit_after(run: Path, step: int) -> None:
    """Remove the credit of later steps: a resume from `step` takes them back."""
    for later, rule in [*_files(run)]:
        if later > step:
            credit_path(run, later, rule).unlink()


def credit_steps(run: Path) -> list[int]:
    """Steps that have a credit file, ascending."""
    return sorted(step for step, rule in _files(run) if rule is None)


def credit_rules(run: Path, step: int) -> list[str]:
    """Other rules that were asked about `step`."""
    return sorted(rule for other, rule in _files(run) if other == step and rule is not None)


def credit_files(run: Path) -> list[tuple[int, Path]]:
    """Step and file of all credit on record, that of other rules too, by step."""
    return sorted((step, credit_path(run, step, rule)) for step, rule in _files(run))


def _files(run: Path) -> Iterator[tuple[int, str | None]]:
    """(step, other rule) of every credit file."""
    names = (_NAME.fullmatch(path.name) for path in (run / FOLDER).glob("step-*.arrow"))
    return ((int(name.group(1)), name.group(2)) for name in names if name)


def _check(step: int, batch: pa.RecordBatch) -> None:
    if not batch.schema.equals(credit_schema()):
        raise ValueError(f"not the schema of the credit log:\n{batch.schema}")
    if pc.any(pc.not_equal(batch.column("step"), step)).as_py():
        raise ValueError(f"rows of other steps in the credit of step {step}")
    first, *others = (pc.list_value_length(batch.column(name)) for name in _LISTS)
    if not all(lengths.equals(first) for lengths in others):
        raise ValueError(f"in step {step} the lists of a completion have unequal lengths")


def _runs(group_ids: npt.NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """(start, end) of every stretch of equal group ids."""
    changes = np.flatnonzero(np.diff(group_ids)) + 1
    edges = [0, *changes.tolist(), len(group_ids)] if len(group_ids) else []
    return itertools.pairwise(edges)


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """A damaged file is the reader's to know of: Arrow has many errors for it."""
    try:
        yield
    except (pa.ArrowException, OSError, KeyError, UnicodeDecodeError, OverflowError) as error:
        raise UserError(f"{path} is damaged, or no credit log: {first_line(error)}") from error


def _with_all_columns(table: pa.Table) -> pa.Table:
    """`table` as this release writes it, whatever version it is of."""
    for field in credit_schema():
        if field.name not in table.schema.names:
            table = table.append_column(field, pa.nulls(table.num_rows, field.type))
    return table.cast(credit_schema())


def _opened(path: Path, columns: list[str] | None = None) -> pa.ipc.RecordBatchFileReader:
    schema = credit_schema()
    fields = None if columns is None else [schema.get_field_index(name) for name in columns]
    try:
        reader = pa.ipc.open_file(
            pa.memory_map(str(path)), options=pa.ipc.IpcReadOptions(included_fields=fields)
        )
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist: this step has no credit on record") from error
    found = (reader.schema.metadata or {}).get(VERSION_KEY)
    known = (*OLDER_VERSIONS, CREDIT_VERSION)
    if found not in {str(version).encode() for version in known}:
        raise UserError(
            f"{path} has credit log version {found!r}, this release reads "
            f"{' and '.join(map(str, known))}: read it with the release that wrote it"
        )
    return reader
