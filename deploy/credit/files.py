"""Where a run keeps what was measured of it."""

from __future__ import annotations

from pathlib import Path

FOLDER = "measured"
SEGMENTS, RESULTS = "segments.parquet", "results.json"


def measured_path(run: Path, step: int) -> Path:
    """The folder of what was measured of learner step `step` of the run directory `run`."""
    return run / FOLDER / f"step-{step:06d}"
