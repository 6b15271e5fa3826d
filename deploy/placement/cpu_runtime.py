"""Libraries that make vLLM faster on a CPU, where they are installed."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

_SYSTEM_FOLDERS = ("/usr/lib", "/usr/lib64", "/usr/local/lib", "/lib")
_ALLOCATORS = ("libtcmalloc_minimal.so*", "libtcmalloc.so*")
"""Files of tcmalloc; the first has no heap profiler, which nothing here uses."""


def preload_libraries(folders: Sequence[str] = _SYSTEM_FOLDERS) -> list[str]:
    """Find what to put into LD_PRELOAD: the allocator tcmalloc, where it is installed.

    Intel's OpenMP, which vLLM's CPU package brings, is left out: it gave the same speed here, and
    leaves a file in shared memory behind for every process that is killed.
    """
    if not sys.platform.startswith("linux"):
        return []
    return [str(path) for path in _first(_ALLOCATORS, folders)]


def _first(patterns: Sequence[str], folders: Sequence[str]) -> list[Path]:
    for pattern in patterns:
        for folder in folders:
            root = Path(folder)
            found = sorted([*root.glob(pattern), *root.glob(f"*-linux-gnu/{pattern}")])
            if found:
                return [found[0]]
    return []
