"""Sealed folders: a list of files with sizes and checksums, so that a torn one is recognised."""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path

MANIFEST = "manifest.json"
_CHUNK = 4 * 2**20


def seal(folder: Path) -> None:
    """List every file under `folder` and flush all of it to the disk.

    Raises:
        OSError: the disk is full or does not take it.
    """
    files = {
        str(path.relative_to(folder)): [path.stat().st_size, checksum(path)]
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
    (folder / MANIFEST).write_text(json.dumps(files, indent=0))
    for path in [*folder.rglob("*"), folder]:
        _flush(path)


def damage(folder: Path) -> str | None:
    """What is wrong with a sealed folder; None when it is as it was sealed."""
    try:
        files = json.loads((folder / MANIFEST).read_text())
        listed = [(str(name), int(size), int(sum_)) for name, (size, sum_) in files.items()]
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        return f"{MANIFEST} cannot be read: {error}"
    if not listed:
        return f"{MANIFEST} lists no file"
    for name, size, expected in listed:
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, not {size}"
        if checksum(path) != expected:
            return f"{name} is not what was written (checksum)"
    return None


def checksum(path: Path) -> int:
    """CRC-32 of a file."""
    value = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            value = zlib.crc32(chunk, value)
    return value


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
