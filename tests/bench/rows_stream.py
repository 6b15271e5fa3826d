"""Groups through stream and log, no model: 8 completions of 1,000 tokens each."""

from __future__ import annotations

import shutil
import tempfile
import time

import numpy as np
import ray
from harness import Row, emit
from learner_models import trajectories

from common.stream import TrajectoryStream

GROUPS, REPEATS = 300, 5


def main() -> None:
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    batches = trajectories([(200, [1000] * 8)] * 20)
    refs = [ray.put(batch) for batch in batches]
    nbytes = batches[0].nbytes
    rates, ratios = [], []
    source = np.random.default_rng(0).integers(0, 255, nbytes, dtype=np.uint8)
    for _ in range(REPEATS):
        folder = tempfile.mkdtemp()
        stream = TrajectoryStream(folder, ["test"])
        started = time.perf_counter()
        for index in range(GROUPS):
            stream.append([refs[index % len(refs)]])
        taken = time.perf_counter() - started
        stream.close()
        shutil.rmtree(folder)
        started = time.perf_counter()
        for _ in range(GROUPS):
            source.copy()
        copied = time.perf_counter() - started
        rates.append(GROUPS / taken)
        ratios.append(taken / copied)
    ray.shutdown()
    emit(
        [
            Row(
                "groups per second through stream and log, 8 x 1,000 tokens",
                "500 groups a second",
                [rate / 500 for rate in rates],
                1.0,
                True,
                f"{np.median(rates):.0f} groups/s of {nbytes / 2**10:.0f} KiB; "
                f"{np.median(ratios):.0f} times a memory copy of the bytes",
            )
        ]
    )


if __name__ == "__main__":
    main()
