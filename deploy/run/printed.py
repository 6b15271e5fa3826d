"""What the processes of a run print: the newest of each is kept, and reaches the run's folder.

Ray can rotate these files itself. A process then writes into a pipe, which one of its own threads
empties into the file. If the process dies at once, what is still in the pipe is lost: the last
words, from which one would learn why. So processes write into their files directly, and the old
part of a large file is given back to the disk from here. Nothing that is written meanwhile is lost.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

_KEEP_SIZE, _PUNCH_HOLE = 0x01, 0x02
"""Of fallocate(2): the bytes are no longer on the disk, and all others stay where they are."""
_BLOCK = 4096
_LOOK_S = 30.0


class Cutter:
    """Looks at the files of all processes every half minute, until `stop`."""

    def __init__(self, folder: Path, newest: int) -> None:
        """`newest`: bytes of each file that stay."""
        self._folder, self._newest = folder, newest
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="printed", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        self._ended.set()
        self._thread.join(_LOOK_S)

    def _run(self) -> None:
        while not self._ended.wait(_LOOK_S):
            try:
                for path in printed_in(self._folder):
                    cut(path, self._newest)
            except OSError as error:
                if error.errno == errno.ENOENT:
                    continue  # Ray has removed it meanwhile
                print(
                    f"warning: what processes print is not cut, and grows in {self._folder}: "
                    f"{error}. Look at its size in a long run",
                    file=sys.stderr,
                    flush=True,
                )
                return


def printed_in(folder: Path) -> Iterator[Path]:
    """The files into which processes of a session of Ray print."""
    yield from folder.glob("worker-*.out")
    yield from folder.glob("worker-*.err")


def cut(path: Path, newest: int) -> None:
    """Give all but the newest bytes of a file back to the disk. Its size stays, as a number.

    Raises:
        OSError: the file is gone, or its file system cannot do it.
    """
    with path.open("r+b") as file:
        old = (os.fstat(file.fileno()).st_size - newest) // _BLOCK * _BLOCK
        if old <= 0:
            return
        how = ctypes.c_int(_KEEP_SIZE | _PUNCH_HOLE)
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.fallocate(file.fileno(), how, ctypes.c_int64(0), ctypes.c_int64(old)):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), str(path))


def copy_printed(folder: Path, to: Path) -> None:
    """Copy what is left of every file that is not empty."""
    to.mkdir(exist_ok=True)
    for path in printed_in(folder):
        if not path.stat().st_size:
            continue
        with path.open("rb") as source, (to / path.name).open("wb") as copy:
            source.seek(os.lseek(source.fileno(), 0, os.SEEK_DATA))
            shutil.copyfileobj(source, copy)
