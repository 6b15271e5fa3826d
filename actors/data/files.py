"""Records of data files as they are: JSON lines, JSON, CSV and Parquet, also packed by gzip.

`file_records` reads a file, a folder, or all that a pattern names. A record that cannot be read
comes as the `UserError` that says why; what is wrong with a whole file is raised.
"""

from __future__ import annotations

import csv
import glob
import gzip
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from common.errors import UserError

Place = tuple[str, Any]
"""Where a record stands, and the record; or in its place the `UserError` that says why not."""

_BOM = b"\xef\xbb\xbf"
SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")


def data_files(name: str) -> list[Path]:
    """The files that `name` stands for, in the order of their names; commas part several names.

    Raises: `UserError` where there is none.
    """
    found = _found(name)
    if not found:
        raise UserError(
            f"data file {name} does not exist (looked in {Path.cwd()}): give data.path a file, a "
            f"folder or a pattern with files of {', '.join(SUFFIXES)}, also with .gz"
        )
    return found


def _found(name: str) -> list[Path]:
    path = Path(name).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        return sorted(file for file in path.rglob("*") if file.is_file() and _kind(file))
    if "," in name:
        parts = [_found(part.strip()) for part in name.split(",")]
        return [file for part in parts for file in part] if all(parts) else []
    return sorted(map(Path, glob.glob(str(path), recursive=True)))


def _kind(path: Path) -> str:
    """The suffix that says how a file is read, without `.gz`; empty for any other file."""
    name = path.name.lower().removesuffix(".gz")
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), "")


def file_records(name: str) -> Iterator[Place]:
    """(place, record) of every row of the files that `name` stands for.

    Raises: `UserError` when there is no such file, or one of another kind.
    """
    for path in data_files(name):
        read = _READERS.get(_kind(path))
        if read is None:
            raise UserError(
                f"data file {path} is none of {', '.join(SUFFIXES)} (also with .gz): convert it to "
                "one of them"
            )
        yield from read(path)


def _open(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path)) if path.suffix == ".gz" else path.open("rb")


def _read_jsonl(path: Path) -> Iterator[Place]:
    try:
        with _open(path) as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield _parsed(f"{path}, line {number}", line.removeprefix(_BOM))
    except (gzip.BadGzipFile, EOFError) as error:
        raise UserError(f"{path} cannot be unpacked: {error}; write it again") from error


def _parsed(place: str, line: bytes) -> Place:
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError as error:
        return place, UserError(
            f"{place}: not UTF-8 (byte {error.start} is "
            f"0x{error.object[error.start]:02x}): save the file as UTF-8"
        )
    except (ValueError, RecursionError) as error:
        return place, UserError(f"{place}: not a JSON object: {error}")
    return _object(place, record)


def _object(place: str, record: Any) -> Place:
    if not isinstance(record, dict):
        return place, UserError(f"{place}: a {type(record).__name__}, not a JSON object")
    return place, record


def _read_json(path: Path) -> Iterator[Place]:
    """A list of objects, one object that holds such a list, or JSON lines under another name."""
    with _open(path) as file:
        content = file.read().removeprefix(_BOM)
    try:
        whole = json.loads(content.decode())
    except (ValueError, RecursionError):
        yield from _read_jsonl(path)
        return
    if isinstance(whole, dict):
        lists = [value for value in whole.values() if isinstance(value, list)]
        whole = lists[0] if len(lists) == 1 else [whole]
    records = whole if isinstance(whole, list) else [whole]
    yield from (_object(f"{path}, row {number}", one) for number, one in enumerate(records))


def _read_csv(path: Path) -> Iterator[Place]:
    with _open(path) as file:
        try:
            text = io.TextIOWrapper(file, "utf-8-sig", newline="")
            for number, record in enumerate(csv.DictReader(text, strict=True)):
                place = f"{path}, row {number}"
                if None in record or None in record.values():
                    yield place, UserError(f"{place}: another number of fields than the first line")
                else:
                    yield place, record
        except (csv.Error, UnicodeDecodeError) as error:
            raise UserError(f"{path} cannot be read as CSV in UTF-8: {error}") from error


def _read_parquet(path: Path) -> Iterator[Place]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches():
                for record in batch.to_pylist():
                    yield f"{path}, row {number}", record
                    number += 1
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path} cannot be read as Parquet: {error}; write it again, or give a .jsonl file"
        ) from error


_READERS = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
