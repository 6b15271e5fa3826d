"""Freed memory of the learner is kept, and given back to the system only when holes pile up.

The next micro-batch asks for it again. Under another C library than glibc nothing is done.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch.nn import Parameter

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
"""Parameter numbers of mallopt(3)."""
_MUCH = 2**26
"""Bytes that are given back at a time."""
_GROWTH = 1.25
_SETTLING_STEPS = 4


def keep_freed_memory() -> None:
    """Let glibc keep what is freed instead of giving large blocks back to the kernel.

    A micro-batch frees and asks for the same hundreds of megabytes again; faulting them in anew
    cost a fifth of a step's CPU time (135M parameters). The process then stays at its peak
    size, which it reaches every step anyway.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "gnu_get_libc_version"):
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, -1)


def release_freed_memory() -> None:
    """Give freed pages back to the kernel; the counterpart of `keep_freed_memory`."""
    torch.cuda.empty_cache()  # nothing where CUDA was not used
    libc = ctypes.CDLL(None)
    if hasattr(libc, "gnu_get_libc_version"):
        libc.malloc_trim(0)


def anonymous_bytes() -> int:
    """Memory of this process that is no file's; 0 where that is not known."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(x.split()[1]) for x in lines if x.startswith("RssAnon:")), 0)


def narrow(parameters: Iterable[Parameter], dtype: torch.dtype) -> None:
    """Bring parameters to a narrower type, so that both forms of all never stand side by side.

    What a loader's threads have allocated is not used again by others: it has to be given back.
    """
    freed = 0
    for parameter in parameters:
        if parameter.dtype != dtype:
            freed += parameter.nbytes
            parameter.data = parameter.data.to(dtype)
        if freed > _MUCH:
            release_freed_memory()
            freed = 0
    release_freed_memory()


class HeapWatch:
    """Bounds the growth of a heap that is never trimmed: `after_step` once a step.

    Micro-batches differ in size, so new patterns of holes may make it grow. It is trimmed when it
    is a quarter above what the first steps, or those after the last time, needed. Not more often:
    the step after it faults everything in anew (3 of 11 s at 135M parameters on two cores).
    """

    def __init__(
        self,
        size: Callable[[], int] = anonymous_bytes,
        release: Callable[[], None] = release_freed_memory,
    ) -> None:
        self._size, self._release = size, release
        self._steps = 0
        self._needed = 0

    def after_step(self) -> None:
        size = self._size()
        self._steps += 1
        if self._steps <= _SETTLING_STEPS:
            self._needed = max(self._needed, size)
        elif size > _GROWTH * self._needed:
            self._release()
            self._steps = self._needed = 0
