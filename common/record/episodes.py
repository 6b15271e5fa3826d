"""Episodes of several turns in numbers: what a step's record says of them.

Legend: G episodes of a group.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from common.record.schema import CUT, ERROR, TIMEOUT
from common.record.turns import sampled_lengths, spans, tool_calls

ENDS = ("stop", *CUT, ERROR, TIMEOUT)
"""How an episode ends: its finish reason, or the failure of its environment."""

ENDED = "episode/ended/"
"""Beginning of the metrics that count ends."""


@dataclass(frozen=True)
class EpisodeSums:
    """Sums over the episodes of a group."""

    episodes: int
    turns: int
    given_tokens: int
    """Tokens that were given behind the prompt and behind guidance."""
    environment_s: float
    wall_s: float
    """From the dispatch of the group to the end of the episodes, summed over them."""
    tool_calls: int
    tool_errors: int
    ends: Counter[str] = field(default_factory=Counter)
    segments: int = 0
    """Conversations: one for each episode that has no segments."""


def episode_sums(batch: pa.RecordBatch) -> EpisodeSums | None:
    """Sums over the episodes of a group; None where they were played in no environment."""
    verdicts = batch.column("environment_verdict").to_pylist()
    seconds = pc.sum(batch.column("environment_s")).as_py()
    if not any(verdicts) and not seconds:
        return None
    lengths_G = np.diff(batch.column("token_ids").offsets.to_numpy())
    guidance = pc.sum(batch.column("guidance_length")).as_py()
    reasons = batch.column("finish_reason").to_pylist()
    ends = [
        verdict if verdict in (ERROR, TIMEOUT) else reason
        for verdict, reason in zip(verdicts, reasons, strict=True)
    ]
    return EpisodeSums(
        batch.num_rows,
        len(spans(batch).row_U),
        int(lengths_G.sum() - sampled_lengths(batch).sum()) - guidance,
        seconds,
        pc.sum(pc.subtract(batch.column("finished_s"), batch.column("dispatched_s"))).as_py(),
        *tool_calls(batch),
        Counter(ends),
        int(np.maximum(np.diff(batch.column("segments").offsets.to_numpy()), 1).sum()),
    )


def episode_metrics(groups: Sequence[EpisodeSums | None]) -> dict[str, float]:
    """Metrics of a step's groups; none where no episode was played in an environment."""
    played = [sums for sums in groups if sums is not None]
    if not played:
        return {}
    count = sum(sums.episodes for sums in played)
    seconds = sum(sums.environment_s for sums in played)
    wall_s = sum(sums.wall_s for sums in played)
    ends = sum((sums.ends for sums in played), Counter[str]())
    return {
        "episode/turns": sum(sums.turns for sums in played) / count,
        "episode/segments": sum(sums.segments for sums in played) / count,
        "episode/given_tokens": sum(sums.given_tokens for sums in played) / count,
        "episode/tool_calls": sum(sums.tool_calls for sums in played) / count,
        "episode/tool_errors": sum(sums.tool_errors for sums in played) / count,
        "episode/environment_s": seconds / count,
        "episode/environment_share": seconds / wall_s if wall_s > 0 else 0.0,
        "episode/ended/stop": float(ends["stop"]),
        "episode/ended/length": float(ends["length"]),
        "episode/ended/turns": float(ends["turns"]),
        "episode/ended/context": float(ends["context"]),
        "episode/ended/error": float(ends[ERROR]),
        "episode/ended/timeout": float(ends[TIMEOUT]),
    }
