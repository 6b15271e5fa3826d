"""Memory that a learner rank takes for a step: `python learner_peak.py FOLDER RANK`.

Prints two peaks: `allocated`, what was asked for and not yet freed, and `private`, the pages that
the process held for it. Private is more: freed pieces lie between used ones. Both are bytes beyond
what the process held after the same with a tiny model, so libraries are not counted. Pages of files
are not either: the system takes them back when it likes.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
import tempfile
import threading
import time
from pathlib import Path

from learner_models import save_tiny_model, trajectories
from learner_ranks import worker

from common.config.sections import AdapterConfig
from learner.training.heap import release_freed_memory

SHAPES = [(9, [5, 12, 3, 7])]


def private() -> int:
    """Bytes of this process that belong to no file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


class HeapAccount(ctypes.Structure):
    """`struct mallinfo2` of glibc."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]


LIBC = ctypes.CDLL("libc.so.6")
LIBC.mallinfo2.restype = HeapAccount


def allocated() -> int:
    """Bytes that were asked for and not freed, in all heaps of this process."""
    account = LIBC.mallinfo2()
    return int(account.uordblks + account.hblkhd)


class Peak(threading.Thread):
    """The most that was held of each, looked at every other millisecond."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.before = {"allocated": allocated(), "private": private()}
        self.most, self.running = dict(self.before), True

    def run(self) -> None:
        while self.running:
            held = {"allocated": allocated(), "private": private()}
            self.most = {name: max(most, held[name]) for name, most in self.most.items()}
            time.sleep(0.002)

    def beyond(self) -> dict[str, int]:
        """Bytes beyond what was held before."""
        return {name: most - self.before[name] for name, most in self.most.items()}


def train(folder: Path, rank: int) -> None:
    adapter = AdapterConfig(rank=rank)
    with worker(folder, adapter=adapter, dtype="bfloat16", logits_mib=1.0) as made:
        for number in range(2):
            made.step(trajectories(SHAPES, seed=number), number, number)


def main() -> None:
    """Train on the tiny model, then on the one that is measured."""
    folder, rank = Path(sys.argv[1]), int(sys.argv[2])
    with tempfile.TemporaryDirectory() as tiny:
        train(save_tiny_model(Path(tiny)), rank)
    gc.collect()
    release_freed_memory()
    peak = Peak()
    peak.start()
    train(folder, rank)
    peak.running = False
    peak.join()
    print(json.dumps(peak.beyond()))


if __name__ == "__main__":
    main()
