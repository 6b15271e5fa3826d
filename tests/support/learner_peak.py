"""Private memory that a learner rank takes for one step: `python learner_peak.py FOLDER RANK`.

Prints bytes beyond what the process held after the same with a tiny model, so that libraries and
arenas are not counted. Pages of files are not either: the system takes them back when it likes.
"""

from __future__ import annotations

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


class Peak(threading.Thread):
    """The most that was held, looked at every other millisecond."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most, self.running = private(), True

    def run(self) -> None:
        while self.running:
            self.most = max(self.most, private())
            time.sleep(0.002)


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
    before, peak = private(), Peak()
    peak.start()
    train(folder, rank)
    peak.running = False
    peak.join()
    print(json.dumps(peak.most - before))


if __name__ == "__main__":
    main()
