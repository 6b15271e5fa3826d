"""Libraries that make vLLM fast on CPU, when they are there."""

from __future__ import annotations

import sys
from pathlib import Path

_SYSTEM_FOLDERS = ("/usr/lib", "/usr/lib64", "/usr/local/lib", "/lib")


def preload_libraries() -> list[str]:
    """Paths for LD_PRELOAD: the allocator tcmalloc, where it is installed.

    Intel's OpenMP, which vLLM's CPU package brings, is left out: it gave the same speed here, and
    leaves a file in shared memory behind for every process that is killed.
    """
    if not sys.platform.startswith("linux"):
        return []
    return [str(path) for path in _first("libtcmalloc_minimal.so*", _SYSTEM_FOLDERS)]


def _first(pattern: str, folders: tuple[str, ...]) -> list[Path]:
    for folder in folders:
        root = Path(folder)
        found = sorted([*root.glob(pattern), *root.glob(f"*-linux-gnu/{pattern}")])
        if found:
            return [found[0]]
    return []
