"""Lending a buffer to vLLM's worker: both sides of one naming.

NamedBuffer   by name, for a worker in this very process: no copy
MemoryFile    by the path of a file in memory, for a worker in a process of its own: one copy
buffer_at     the worker's side of both
"""

from __future__ import annotations

import itertools
import mmap
import os

import numpy as np
import numpy.typing as npt

from common.errors import WeightsError

_LENT = "lent:"
_buffers: dict[str, npt.NDArray[np.uint8]] = {}
_numbers = itertools.count()


def lend(buffer: npt.NDArray[np.uint8], in_process: bool) -> NamedBuffer | MemoryFile:
    """Make `buffer` known to the worker, which is `in_process` or not, while the context lasts."""
    return NamedBuffer(buffer) if in_process else MemoryFile(buffer)


class NamedBuffer:
    """A buffer that this process finds by a name; as a context, the name."""

    def __init__(self, buffer: npt.NDArray[np.uint8]) -> None:
        self._name = f"{_LENT}{next(_numbers)}"
        self._buffer = buffer

    def __enter__(self) -> str:
        _buffers[self._name] = self._buffer
        return self._name

    def __exit__(self, *_: object) -> None:
        del _buffers[self._name]


class MemoryFile:
    """A file without a name, gone with this process however that ends; as a context, its path."""

    def __init__(self, content: npt.NDArray[np.uint8]) -> None:
        self._descriptor = os.memfd_create("grpo-lambda-weights")
        try:
            with open(self._descriptor, "wb", closefd=False) as file:
                file.write(content.data)
        except BaseException:
            os.close(self._descriptor)
            raise

    def __enter__(self) -> str:
        return f"/proc/{os.getpid()}/fd/{self._descriptor}"

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)


def buffer_at(place: str) -> npt.NDArray[np.uint8]:
    """The buffer that was lent under a name or lies in a file; do not write to it.

    Raises:
        WeightsError: nothing is there.
    """
    if place.startswith(_LENT):
        if place not in _buffers:
            raise WeightsError(f"weight bucket {place} was not lent by this process, or not now")
        return _buffers[place]
    descriptor = os.open(place, os.O_RDONLY)
    try:
        size = os.fstat(descriptor).st_size
        if size == 0:
            raise WeightsError(f"weight bucket {place} is empty")
        return np.frombuffer(mmap.mmap(descriptor, size, prot=mmap.PROT_READ), dtype=np.uint8)
    finally:
        os.close(descriptor)
