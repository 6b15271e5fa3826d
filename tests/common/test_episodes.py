"""What a step's record says of episodes."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest
from learner_models import trajectories

from common.record.episodes import ENDS, episode_metrics, episode_sums
from common.record.turns import turn


def group(*changes: dict[str, Any]) -> pa.RecordBatch:
    """Completions of four tokens, each changed."""
    (made,) = trajectories([(3, [4] * len(changes))])
    rows = made.to_pylist()
    for row, change in zip(rows, changes, strict=True):
        row.update(change)
    return pa.RecordBatch.from_pylist(rows, schema=made.schema)


TWO_TURNS = {
    "turns": [turn(0, 1, "stop") | {"calls": 3, "failed": 1}, turn(3, 4, "stop")],
    "dispatched_s": 100.0,
    "finished_s": 110.0,
    "behaviour_logprobs": [-1.0, float("nan"), float("nan"), -1.0],
    "environment_s": 0.5,
}


def test_turns_given_tokens_seconds_and_ends_are_counted() -> None:
    first = group(
        TWO_TURNS | {"environment_verdict": "pass"},
        {"environment_verdict": "fail", "finish_reason": "turns", "environment_s": 1.5}
        | {"dispatched_s": 100.0, "finished_s": 105.0},
    )
    second = group(TWO_TURNS | {"environment_verdict": "error", "finish_reason": "stop"})
    found = episode_metrics([episode_sums(first), episode_sums(second), None])
    assert found["episode/turns"] == pytest.approx(5 / 3)
    assert found["episode/given_tokens"] == pytest.approx(4 / 3)
    assert found["episode/tool_calls"] == pytest.approx(6 / 3)
    assert found["episode/tool_errors"] == pytest.approx(2 / 3)
    assert found["episode/environment_s"] == pytest.approx(2.5 / 3)
    assert found["episode/environment_share"] == pytest.approx(2.5 / 25)
    ended = {end: found[f"episode/ended/{end}"] for end in ENDS}
    assert ended == {
        "stop": 1, "turns": 1, "error": 1, "length": 0, "context": 0, "timeout": 0
    }  # fmt: skip


def test_guidance_is_given_by_no_environment() -> None:
    guided = {
        "turns": [turn(2, 4, "stop")],
        "behaviour_logprobs": [float("nan"), float("nan"), -1.0, -1.0],
        "guidance_length": 2,
    }
    assert episode_sums(group(guided)) is None
    sums = episode_sums(group(guided | {"environment_verdict": "pass"}))
    assert sums is not None
    assert sums.given_tokens == 0
    assert episode_metrics([None]) == {}
