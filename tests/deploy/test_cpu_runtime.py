"""Libraries for LD_PRELOAD are found where distributions put them."""

from __future__ import annotations

from pathlib import Path

import pytest

from deploy.placement.cpu_runtime import preload_libraries


@pytest.mark.parametrize(
    ("installed", "found"),
    [
        ([], []),
        (["lib/libtcmalloc.so.4"], ["lib/libtcmalloc.so.4"]),
        (
            ["lib64/libtcmalloc_minimal.so.4", "lib/libtcmalloc.so.4"],
            ["lib64/libtcmalloc_minimal.so.4"],
        ),
        (["lib/x86_64-linux-gnu/libtcmalloc.so.4.5"], ["lib/x86_64-linux-gnu/libtcmalloc.so.4.5"]),
        (["lib/libtcmalloc_and_profiler.so.4"], []),
    ],
)
def test_the_allocator_is_found(tmp_path: Path, installed: list[str], found: list[str]) -> None:
    for name in installed:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    folders = [str(tmp_path / folder) for folder in ("lib", "lib64")]
    assert preload_libraries(folders) == [str(tmp_path / name) for name in found]
