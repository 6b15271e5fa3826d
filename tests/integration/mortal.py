"""Actors that die when asked to, in a module of few imports: their processes pay for each."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

import pyarrow as pa

if TYPE_CHECKING:
    from common.trajectory import GroupRequest


class Mortal:
    """Generator and verifier in one; asked for it, it dies."""

    def __init__(self) -> None:
        self.version = -1

    async def start(self, cache_bytes: int | None = None) -> None:
        self.version = 0

    async def warm_up(self) -> None:
        self.version = 0

    async def generate_group(self, request: GroupRequest) -> tuple[pa.RecordBatch, int]:
        assert self.version >= 0, "asked before it was up"
        batch = pa.record_batch({"version": [self.version] * 20_000})
        return batch, 1 if request.prompt_text == "die" else 0

    async def more_of(self, number: int) -> tuple[pa.RecordBatch | None, int]:
        os.kill(os.getpid(), signal.SIGKILL)
        return None, -1

    async def update_weights(self, buckets: list[str], version: int) -> float:
        if buckets == ["deadly"] and self.version == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        self.version = version
        return 0.0

    async def ping(self) -> None:
        pass

    async def score(self, sequences: list[list[int]], lengths: list[int]) -> list[list[float]]:
        return [[-float(self.version)] for _ in sequences]

    async def score_group(self, batch: pa.RecordBatch) -> tuple[pa.RecordBatch, int]:
        assert self.version >= 0, "asked before it was up"
        if batch.num_rows == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return batch, batch.num_rows


class SecondTime(Mortal):
    """In the place of one that died: no longer killed by small batches and deadly weights."""

    async def score_group(self, batch: pa.RecordBatch) -> tuple[pa.RecordBatch, int]:
        assert self.version >= 0, "asked before it was up"
        return batch, batch.num_rows

    async def update_weights(self, buckets: list[str], version: int) -> float:
        self.version = version
        return 0.0


class Stillborn(Mortal):
    """Dies as it starts."""

    async def start(self, cache_bytes: int | None = None) -> None:
        os.kill(os.getpid(), signal.SIGKILL)
