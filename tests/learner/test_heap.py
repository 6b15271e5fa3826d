"""Freed memory is kept between steps, and given back when the heap has grown for nothing."""

from __future__ import annotations

import subprocess
import sys

import pytest

from learner.training.heap import HeapWatch

MIB = 2**20


class Process:
    """A heap that grows by holes: each step leaves some, a release removes them."""

    def __init__(self, needed: int, holes: int) -> None:
        self.needed, self.holes, self.size = needed, holes, 0
        self.released: list[int] = []
        self.peak = 0
        self.watch = HeapWatch(lambda: self.size, self._release)

    def _release(self) -> None:
        self.released.append(self.step)
        self.size = 0

    def run(self, steps: int) -> None:
        for self.step in range(1, steps + 1):
            self.size = max(self.size + self.holes, self.needed)
            self.peak = max(self.peak, self.size)
            self.watch.after_step()


def test_steady_heap_is_never_released() -> None:
    process = Process(needed=1000, holes=0)
    process.run(200)
    assert process.released == []


@pytest.mark.parametrize("holes", [1, 10, 60, 200])
def test_growth_is_bounded_whatever_its_speed(holes: int) -> None:
    process = Process(needed=1000, holes=holes)
    process.run(500)
    assert process.released
    # Holes of the settling steps count as needed, and one more step makes its own.
    assert process.peak <= 1.25 * (1000 + 3 * holes) + holes


def test_larger_batches_are_released_for_once() -> None:
    process = Process(needed=1000, holes=0)
    process.run(10)
    process.needed = 2000
    process.run(100)
    assert process.released == [1]


def test_unknown_size_is_never_released() -> None:
    process = Process(needed=0, holes=0)
    process.run(20)
    assert process.released == []


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc and calls glibc")
def test_real_heap_keeps_what_is_freed_until_it_is_released() -> None:
    script = """
import torch
from learner.training.heap import anonymous_bytes, keep_freed_memory, release_freed_memory
keep_freed_memory()
before = anonymous_bytes()
held = [torch.ones(2**20) for _ in range(64)]
full = anonymous_bytes()
del held
kept = anonymous_bytes()
release_freed_memory()
print(before, full, kept, anonymous_bytes())
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True
    )
    before, full, kept, released = (int(size) for size in done.stdout.split())
    assert full - before > 250 * MIB
    assert kept > full - 20 * MIB
    assert released < before + 50 * MIB
