"""A run directory's copy on another file system (`checkpoint.mirror`): s3, gs, hdfs, or a folder.

A run needs locks and files that grow, which object stores do not have. It is written to a local
disk and copied after every checkpoint, what has changed alone. A copy may end at any moment, so
there is an order in which what is there can be resumed from: a snapshot of the ledger is taken;
the log goes first, in which is every group that this ledger knows; then the ledger; then
checkpoints, each with its manifest last. A torn checkpoint is one that its manifest refutes.
"""

from __future__ import annotations

import shutil
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from pyarrow import fs

from common.errors import RunError, UserError
from common.record.ledger import reading
from common.record.manifest import MANIFEST
from deploy.run.directory import LEDGER

_CHUNK = 16 * 2**20
_WHOLE_WRITES = ("s3", "gcs")
"""Where a file is there when all of it is, and renaming copies."""


class Mirror:
    """The copies under one place, a folder a run.

    Args:
        place: `s3://bucket/folder`, `gs://...`, `hdfs://...`, `file:///...`, or a folder's path.

    Raises:
        UserError: no such kind of file system, or it cannot be reached.
    """

    def __init__(self, place: str) -> None:
        self._place = place
        uri = place if "://" in place else Path(place).expanduser().resolve().as_uri()
        try:
            self._fs, self._base = fs.FileSystem.from_uri(uri)
        except (OSError, ValueError) as error:
            raise UserError(
                f"checkpoint.mirror={place}: {error}; use s3://, gs://, hdfs:// or a folder"
            ) from error

    def check_apart(self, run: Path) -> None:
        """Raise `UserError` when the copy of `run` would be the run itself, or lie inside it."""
        if self._fs.type_name != "local":
            return
        copy = Path(self._base, run.name).resolve()
        if copy.is_relative_to(run.resolve()):
            raise UserError(
                f"checkpoint.mirror={self._place} would copy {run} onto itself: name a place "
                "outside runs_dir"
            )

    def push(self, run: Path) -> int:
        """Copy what has changed, remove checkpoints that were pruned; the bytes copied.

        Raises:
            RunError: the place does not take it. What is there stays fit to resume from.
            UserError: as `check_apart`.
        """
        self.check_apart(run)
        try:
            there = self._there(run.name)
            copied = 0
            with _ledger_snapshot(run) as ledger:
                for path in _in_order(run, ledger):
                    name = LEDGER if path == ledger else str(path.relative_to(run))
                    if _newer(path, there.pop(name, None)):
                        copied += self._put(path, f"{run.name}/{name}")
            for gone in {name.split("/")[1] for name in there if name.startswith("checkpoints/")}:
                if not (run / "checkpoints" / gone).is_dir():
                    self._fs.delete_dir(f"{self._base}/{run.name}/checkpoints/{gone}")
        except OSError as error:
            raise RunError(
                f"{run} cannot be copied to checkpoint.mirror={self._place}: {error}. Mend the "
                "place or its credentials; go on by resume="
            ) from error
        return copied

    def pull(self, run: Path, notify: Callable[[str], None]) -> bool:
        """Make `run` from its copy; False when there is none.

        Raises:
            RunError: the copy cannot be read.
        """
        try:
            there = self._there(run.name)
            if "config.yaml" not in there:
                return False
            notify(f"{run} is made from its copy in {self._place}")
            partial = run.with_name(f".{run.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            for name in there:
                target = partial / name
                target.parent.mkdir(parents=True, exist_ok=True)
                source = self._fs.open_input_stream(f"{self._base}/{run.name}/{name}")
                with source, target.open("wb") as file:
                    shutil.copyfileobj(source, file, _CHUNK)
            partial.rename(run)
        except OSError as error:
            raise RunError(
                f"the copy of {run.name} in checkpoint.mirror={self._place} cannot be read: {error}"
            ) from error
        return True

    def _there(self, run: str) -> dict[str, fs.FileInfo]:
        """Files of a run's copy by their name inside it."""
        root = f"{self._base}/{run}"
        selector = fs.FileSelector(root, allow_not_found=True, recursive=True)
        found = self._fs.get_file_info(selector)
        return {
            info.path.removeprefix(f"{root}/"): info
            for info in found
            if info.type == fs.FileType.File and not info.path.endswith(".partial")
        }

    def _put(self, path: Path, name: str) -> int:
        """Copy one file; it is there when all of it is."""
        target = f"{self._base}/{name}"
        whole = self._fs.type_name in _WHOLE_WRITES
        aside = target if whole else f"{target}.partial"
        self._fs.create_dir(target.rpartition("/")[0], recursive=True)
        with path.open("rb") as source, self._fs.open_output_stream(aside) as stream:
            shutil.copyfileobj(source, stream, _CHUNK)
        if not whole:
            self._fs.move(aside, target)
        return path.stat().st_size


@contextmanager
def _ledger_snapshot(run: Path) -> Iterator[Path]:
    with tempfile.NamedTemporaryFile(suffix=".sqlite") as file:
        with reading(run / LEDGER) as source, closing(sqlite3.connect(file.name)) as target:
            source.backup(target)
        yield Path(file.name)


def _in_order(run: Path, ledger: Path) -> list[Path]:
    """Files to copy: the log and small ones, the ledger, then checkpoints and their manifests."""
    files = [
        path
        for path in run.rglob("*")
        if path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(run).parts)
        and not path.name.startswith(LEDGER)
        and path.suffix != ".partial"
    ]
    saved = run / "checkpoints"
    files.sort(key=lambda p: (saved in p.parents, p.name == MANIFEST, str(p)))
    first = sum(saved not in path.parents for path in files)
    return [*files[:first], ledger, *files[first:]]


def _newer(path: Path, there: fs.FileInfo | None) -> bool:
    if there is None:
        return True
    mine = path.stat()
    return mine.st_size != there.size or mine.st_mtime_ns > there.mtime_ns
