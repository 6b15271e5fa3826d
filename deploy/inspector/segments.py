"""An index of the groups in the trajectory log, made from its scalar columns alone.

A closed segment is indexed from its Parquet twin; one that has none yet from its Arrow stream,
from where the last look ended. Lengths are not read here: Parquet has the length of a list only in
the levels of all its elements, and the ledger has each group's tokens. A single group is read from
the Arrow stream, whose batches are the groups in the order of the index.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.ipc
import pyarrow.parquet

from common.errors import RunError, UserError, first_line
from common.record.episodes import ENDS
from common.record.parts import REPLACES
from common.record.schema import ERROR, EVERY_LOG_HAS, SUSPICIOUS, TIMEOUT, current
from common.record.trajectory_log import check_segment, segments

_SCALARS = [
    "group_id",
    "ticket",
    "prompt_id",
    "epoch",
    "question",
    "dispatch_version",
    "reward",
    "accuracy",
    "finish_reason",
    "environment_verdict",
]
_IF_THERE = ("part",)
"""What logs of older versions do not have."""
_OF_TURNS = ["turns.list.element.begin", "turns.list.element.failed"]
"""What is read of the turns of a Parquet twin."""
_TEXTS = ["prompt_text", "text"]
_REPEATED = ["question", "prompt_text", "finish_reason", "environment_verdict"]

INDEX = pa.schema(
    [
        pa.field("group_id", pa.int64()),
        pa.field("ticket", pa.int64()),
        pa.field("prompt_id", pa.string()),
        pa.field("epoch", pa.int32()),
        pa.field("dispatch_version", pa.int32()),
        pa.field("completions", pa.int64()),
        pa.field("scored", pa.int64()),  # completions with a reward
        pa.field("reward_mean", pa.float64()),  # of those
        pa.field("reward_std", pa.float64()),  # of those, over all of them (no n - 1)
        pa.field("accuracy", pa.float64()),
        pa.field("turns", pa.float64()),  # mean of a completion
        pa.field("tool_errors", pa.int64()),
        pa.field("ended", pa.int64()),  # a bit for each of `ENDS` that a completion ended by
        pa.field("question", pa.dictionary(pa.int32(), pa.string())),
    ]
)


_UNKNOWN = 62
"""Bit of an end that is none of `ENDS`."""

_NEEDED = (*EVERY_LOG_HAS, "reward", "accuracy", SUSPICIOUS)
"""Columns of a verified group that the page reads."""


class Segment:
    """One segment of the log. `groups` has a row for each whole group in it, under `INDEX`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.groups = INDEX.empty_table()
        self._places: list[int] = []  # where in the file each group's message begins
        self._schema: pa.Schema | None = None
        self._end = 0  # of the messages in `_places`
        self._seen_bytes = -1
        self._has_twin = False

    def refresh(self) -> bool:
        """Read what was appended since the last time; returns whether there was anything.

        Raises:
            UserError: another release wrote the segment.
        """
        if self._has_twin:
            return False
        twin = self.path.with_suffix(".parquet")
        closed = twin.is_file()  # asked first: what is appended before a closing is seen below
        if closed and not self.groups.num_rows:
            self.groups = _index(self._read_twin([*_SCALARS, *_OF_TURNS], _IF_THERE))
            self._has_twin = True
            return True
        self._has_twin = closed
        size = self.path.stat().st_size
        if size == self._seen_bytes:
            return False
        self._seen_bytes = size
        batches = [
            batch.select([*_SCALARS, *_there(batch.schema), "turns"])
            for batch in self._new_batches()
        ]
        if batches:
            self.groups = pa.concat_tables([self.groups, _index(pa.Table.from_batches(batches))])
        return bool(batches)

    def group(self, row: int) -> pa.RecordBatch:
        """The completions of the group in `row` of `groups`."""
        batch = current(*self._batches(range(row, row + 1)))
        expected = self.groups["group_id"][row].as_py()
        if batch.column("group_id")[0].as_py() != expected:
            raise RunError(f"{self.path} and its Parquet twin differ at group {expected}")
        return batch

    def search(self, needle: str, first_row: int) -> npt.NDArray[np.int64]:
        """Rows of `groups`, from `first_row` on, with `needle` in the prompt or a completion.

        Upper and lower case are the same.
        """
        rows = range(first_row, self.groups.num_rows)
        if not rows:
            return np.arange(0)
        if self._has_twin:
            table, rows = self._read_twin(_TEXTS), range(self.groups.num_rows)
        else:
            table = pa.Table.from_batches(batch.select(_TEXTS) for batch in self._batches(rows))
        found = pc.or_(
            *(pc.match_substring(_plain(table[name]), needle, ignore_case=True) for name in _TEXTS)
        )
        sizes = self.groups["completions"].to_numpy()[rows.start :]
        matching = np.unique(np.repeat(np.asarray(rows), sizes)[found.to_numpy()])
        return matching[matching >= first_row]

    def _batches(self, rows: range) -> Iterator[pa.RecordBatch]:
        if rows.stop > len(self._places):
            for _ in self._new_batches():
                pass
        if rows.stop > len(self._places):
            raise RunError(
                f"{self.path} is damaged: it has {len(self._places)} whole groups, and group "
                f"{rows.stop - 1} of it was asked for"
            )
        with pa.memory_map(str(self.path)) as source:
            for row in rows:
                source.seek(self._places[row])
                batch = pa.ipc.read_record_batch(pa.ipc.read_message(source), self._schema)
                batch.validate(full=True)
                yield batch

    def _read_twin(self, columns: list[str], if_there: Sequence[str] = ()) -> pa.Table:
        twin = self.path.with_suffix(".parquet")
        remedy = f"Remove it: the segment beside it, {self.path.name}, holds the same"
        try:
            with pa.parquet.ParquetFile(twin, read_dictionary=_REPEATED) as file:
                parts = [name.partition(".")[0] for name in columns]
                check_segment(file.schema_arrow, twin, parts, remedy)
                more = [name for name in if_there if name in file.schema_arrow.names]
                table = file.read([*columns, *more])
                table.validate(full=True)
                return table
        except (pa.ArrowException, OSError, KeyError, UnicodeDecodeError) as error:
            raise UserError(f"{twin} is damaged: {first_line(error)}. {remedy}") from error

    def _new_batches(self) -> Iterator[pa.RecordBatch]:
        """Whole batches behind those that were read. A torn tail ends them for this time."""
        with pa.memory_map(str(self.path)) as source:
            source.seek(self._end)
            try:
                if self._schema is None:
                    self._schema = pa.ipc.read_schema(source)
                    check_segment(self._schema, self.path, _NEEDED)
                    self._end = source.tell()
                while True:
                    place = source.tell()
                    message = pa.ipc.read_message(source)
                    batch = pa.ipc.read_record_batch(message, self._schema)
                    batch.validate(full=True)  # a flipped bit could lead outside of the file
                    self._places.append(place)
                    self._end = source.tell()
                    yield batch
            except (EOFError, pa.ArrowException, OSError):
                return


class LogIndex:
    """All segments of a trajectory log."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.segments: list[Segment] = []

    def refresh(self) -> None:
        """Read new segments, and what was appended to the others.

        Raises what `Segment.refresh` raises.
        """
        known = {segment.path for segment in self.segments}
        self.segments += [Segment(path) for path in segments(self._folder) if path not in known]
        for segment in self.segments:
            segment.refresh()

    def table(self) -> pa.Table:
        """Groups of all segments, with the columns `segment` and `row`, which name their place."""
        parts = []
        for number, segment in enumerate(self.segments):
            rows = segment.groups.num_rows
            table = segment.groups.append_column("segment", pa.array(np.full(rows, number)))
            parts.append(table.append_column("row", pa.array(np.arange(rows))))
        empty = INDEX.append(pa.field("segment", pa.int64())).append(pa.field("row", pa.int64()))
        table = pa.concat_tables([empty.empty_table(), *parts])
        return table.unify_dictionaries().combine_chunks()


def _there(schema: pa.Schema) -> list[str]:
    return [name for name in _IF_THERE if name in schema.names]


def _of_learner(rows: pa.Table, place: npt.NDArray[np.int64]) -> pa.Table:
    """Rewards of completions, null for drafts: the learner did not get them.

    Args:
        place: of the group of each row.
    """
    judged = rows.select(["reward", "accuracy"])
    if "part" not in rows.column_names:
        return judged
    replacing = pc.equal(_plain(rows["part"]), REPLACES).to_numpy(zero_copy_only=False)
    draft = np.isin(place, place[replacing]) & ~replacing
    columns = [pc.if_else(pa.array(draft), None, column) for column in judged.columns]
    return pa.table(columns, names=judged.column_names) if draft.any() else judged


def _index(rows: pa.Table) -> pa.Table:
    """Rows of groups from rows of completions. Those of a group follow each other."""
    ids = rows["group_id"].to_numpy()
    starts = np.concatenate([[0], np.flatnonzero(np.diff(ids)) + 1]) if len(ids) else np.arange(0)
    place = np.repeat(np.arange(len(starts)), np.diff([*starts, len(ids)]))
    sums = (
        _of_learner(rows, place)
        .append_column("place", pa.array(place))
        .group_by("place", use_threads=False)
        .aggregate(
            [
                ("reward", "mean"),
                ("reward", "stddev"),
                ("reward", "count"),
                ("accuracy", "mean"),
                ([], "count_all"),
            ]
        )
        .sort_by("place")
    )
    first = rows.take(pa.array(starts))
    columns = {name: first[name] for name in INDEX.names if name in first.column_names}
    columns |= {
        "completions": sums["count_all"],
        "scored": sums["reward_count"],
        "reward_mean": sums["reward_mean"],
        "reward_std": sums["reward_stddev"],
        "accuracy": sums["accuracy_mean"],
        **_of_episodes(rows, starts),
        "question": _plain(first["question"]).dictionary_encode(),
    }
    return pa.table({name: columns[name] for name in INDEX.names}).cast(INDEX)


def _of_episodes(rows: pa.Table, starts: npt.NDArray[np.int64]) -> dict[str, pa.Array]:
    """Turns, tool errors and ends of the groups that begin at `starts`."""
    if not len(starts):
        nothing = pa.array([], pa.int64())
        return {"turns": nothing, "tool_errors": nothing, "ended": nothing}
    turns = rows["turns"].combine_chunks()
    counts = pc.list_value_length(turns).to_numpy().astype(np.int64)
    errors = np.zeros(len(counts), np.int64)
    if turns.type.value_type.get_field_index("failed") >= 0:  # else logged before they were counted
        failed = pc.fill_null(pc.struct_field(turns.flatten(), "failed"), 0)
        errors = np.bincount(
            pc.list_parent_indices(turns).to_numpy(), failed.to_numpy(), len(counts)
        ).astype(np.int64)
    verdicts, reasons = (_plain(rows[name]) for name in ("environment_verdict", "finish_reason"))
    ends = pc.if_else(pc.is_in(verdicts, pa.array([ERROR, TIMEOUT])), verdicts, reasons)
    places = pc.fill_null(pc.index_in(ends, pa.array(ENDS)), _UNKNOWN).to_numpy().astype(np.int64)
    sizes = np.diff([*starts, len(counts)])
    return {
        "turns": pa.array(np.add.reduceat(counts, starts) / sizes),
        "tool_errors": pa.array(np.add.reduceat(errors, starts)),
        "ended": pa.array(np.bitwise_or.reduceat(1 << places, starts)),
    }


def _plain(texts: pa.ChunkedArray) -> pa.ChunkedArray:
    return texts.cast(pa.string()) if pa.types.is_dictionary(texts.type) else texts
