"""The trajectory log of a run: the system of record.

Groups are appended, as they are verified, to files `segment-NNNNNN.arrow` in Arrow's IPC stream
format. Such a file is readable up to its last whole batch, however its writer died. A closed
segment is also written as Parquet beside it, for any query engine. Every append is flushed to the
operating system before the group may be trained on.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet

from common.errors import UserError
from common.record.schema import EVERY_LOG_HAS, check_schema, current, damaged_column

SEGMENT_BYTES = 64 * 2**20
_PIECE_BYTES = 8 * 2**20
"""Of a row group of a Parquet twin, before it is compressed."""


class TrajectoryLog:
    """Appends record batches of one schema under `folder`; a new process starts a new segment."""

    def __init__(self, folder: Path, schema: pa.Schema, segment_bytes: int = SEGMENT_BYTES) -> None:
        self._folder = folder
        self._schema = schema
        self._segment_bytes = segment_bytes
        folder.mkdir(parents=True, exist_ok=True)
        # Behind the last, whatever is missing before it: a user may have made room.
        self._index = max((_number(path) for path in folder.glob("segment-*")), default=-1) + 1
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="parquet")
        self._twins: list[Future[None]] = []  # those whose outcome nobody has looked at
        self._file: pa.OSFile | None = None
        self._writer: pa.ipc.RecordBatchStreamWriter | None = None

    def append(self, batch: pa.RecordBatch) -> None:
        """Append one group. Raises `OSError` when the disk is full or read-only."""
        if self._writer is None:
            self._open()
        assert self._writer is not None
        assert self._file is not None
        self._writer.write_batch(batch)
        self._file.flush()
        if self._file.tell() >= self._segment_bytes:
            self._finish_segment()

    def close(self) -> None:
        """Close the open segment, if any, and wait for the Parquet twins.

        Raises:
            OSError: the disk is full or read-only.
        """
        self._finish_segment()
        for twin in self._twins:
            twin.result()
        self._twins.clear()

    def _finish_segment(self) -> None:
        """Its Parquet twin is written beside the next segment, by a thread: it takes a second."""
        if self._writer is None or self._file is None:
            return
        self._writer.close()
        self._file.close()
        self._writer = self._file = None
        for twin in [twin for twin in self._twins if twin.done()]:
            twin.result()
            self._twins.remove(twin)
        path = self._path(self._index)
        self._index += 1
        self._twins.append(self._thread.submit(_write_twin, path, self._schema))

    def _open(self) -> None:
        self._file = pa.OSFile(str(self._path(self._index)), "wb")
        self._writer = pa.ipc.new_stream(self._file, self._schema)

    def _path(self, index: int) -> Path:
        return self._folder / f"segment-{index:06d}.arrow"


def _number(path: Path) -> int:
    """A segment's number, from the name of any of its files."""
    return int(path.name.split(".")[0].rpartition("-")[2])


def _write_twin(path: Path, schema: pa.Schema) -> None:
    """`path`, a closed segment, as Parquet beside it, in pieces that take little memory."""
    partial = path.with_suffix(".parquet.partial")
    # Dictionaries of numbers that hardly repeat cost three times the rest.
    plain = ("token_ids", "behaviour_logprobs")
    repeating = [
        f"{field.name}.list.element" if pa.types.is_list(field.type) else field.name
        for field in schema
        if field.name not in plain
    ]
    with pa.parquet.ParquetWriter(
        partial, schema, compression="zstd", use_dictionary=repeating
    ) as writer:
        for piece in _pieces(read_segment(path)):
            writer.write_table(pa.Table.from_batches(piece, schema=schema))
    pa.default_memory_pool().release_unused()
    os.replace(partial, path.with_suffix(".parquet"))


def _pieces(batches: Iterable[pa.RecordBatch]) -> Iterator[list[pa.RecordBatch]]:
    """The batches, some at a time."""
    piece, nbytes = list[pa.RecordBatch](), 0
    for batch in batches:
        piece.append(batch)
        nbytes += batch.nbytes
        if nbytes >= _PIECE_BYTES:
            yield piece
            piece, nbytes = [], 0
    if piece:
        yield piece


def segments(folder: Path) -> list[Path]:
    """Segment files in the order they were written."""
    return sorted(folder.glob("segment-*.arrow"))


def missing_segments(folder: Path) -> list[str]:
    """Names of segments that were there, as later ones or their Parquet twins tell."""
    there = {_number(path) for path in segments(folder)}
    known = {_number(path) for path in folder.glob("segment-*")}
    first, last = min(known, default=0), max(known, default=-1)
    return [
        f"segment-{number:06d}.arrow" for number in range(first, last + 1) if number not in there
    ]


def read_segment(path: Path) -> Iterator[pa.RecordBatch]:
    """The whole batches of a segment; a torn tail, left by a crash, ends the iteration."""
    with pa.memory_map(str(path)) as source:
        try:
            reader = pa.ipc.open_stream(source)
        except (pa.ArrowException, OSError):
            return  # died before the schema was on disk: no group was appended
        check_segment(reader.schema, path)
        while True:
            try:
                batch = reader.read_next_batch()
                batch.validate(full=True)  # a flipped bit could lead outside of the file
            except (StopIteration, pa.ArrowException, OSError):
                return
            yield current(batch)


def check_segment(
    schema: pa.Schema,
    path: Path,
    wanted: Sequence[str] = EVERY_LOG_HAS,
    remedy: str = "Put a whole copy of it in its place",
) -> None:
    """Raise `UserError` where the segment at `path` is another release's, or its head is damaged.

    Args:
        wanted: columns that are read of it.
        remedy: what to do where it is damaged.
    """
    remedy = f"the file is damaged. {remedy}"
    try:
        names = schema.names
        check_schema(schema)
    except UnicodeDecodeError as error:  # before its base, which another release raises
        raise UserError(f"{path}: the name of a column is no text: {remedy}") from error
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    for name in wanted:
        if name not in names:
            raise UserError(f"{path}: there is no column {name}: {remedy}")
    if (changed := damaged_column(schema)) is not None:
        raise UserError(f"{path}: column {changed} is not of its type: {remedy}")


def read_log(folder: Path) -> Iterator[pa.RecordBatch]:
    """Every whole group of the log, in the order of appending."""
    for path in segments(folder):
        yield from read_segment(path)
