"""The column `segments`: what it must agree with, and logs that were written before it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from learner_models import trajectories

from common.record.episodes import episode_metrics, episode_sums
from common.record.schema import VERSION_KEY, check_schema, current, trajectory_schema
from common.record.segments import check_segments, have_segments, segment
from common.record.trajectory_log import TrajectoryLog, read_log, segments
from common.record.turns import tool_calls

CALLS = ("calls", "failed")


def group(*found: list[dict[str, Any]]) -> pa.RecordBatch:
    """Episodes of four tokens with these segments."""
    (made,) = trajectories([(3, [4] * len(found))])
    rows = made.to_pylist()
    for row, own in zip(rows, found, strict=True):
        row["segments"] = own
    return pa.RecordBatch.from_pylist(rows, schema=made.schema)


def test_segments_are_all_tokens_one_behind_the_other() -> None:
    check_segments(group([], [segment(0, 4, [1])], [segment(0, 1, [1, 2]), segment(1, 4, [3])]))
    assert not have_segments(group([], []))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ([segment(0, 3, [1])], "one behind the other"),
        ([segment(1, 4, [1])], "one behind the other"),
        ([segment(0, 2, [1]), segment(3, 4, [1])], "one behind the other"),
        ([segment(0, 3, [1]), segment(2, 4, [1])], "one behind the other"),
        ([segment(0, 0, [1]), segment(0, 4, [1])], "one behind the other"),
        ([segment(0, 5, [1])], "one behind the other"),
        ([segment(0, 4, [])], "completion 1 has no prompt"),
    ],
)
def test_segments_that_are_not_the_tokens_are_refused(wrong: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_segments(group([], wrong))


def test_conversations_are_counted() -> None:
    played = group([], [segment(0, 1, [1, 2]), segment(1, 4, [3])])
    rows = [row | {"environment_s": 1.0} for row in played.to_pylist()]
    sums = episode_sums(pa.RecordBatch.from_pylist(rows, schema=played.schema))
    assert episode_metrics([sums])["episode/segments"] == 1.5


def of_version_5_and_without_calls(batch: pa.RecordBatch) -> pa.RecordBatch:
    """As it was written before tool calls were counted."""
    old = of_version_5(batch)
    place = old.schema.get_field_index("turns")
    kind = pa.struct([f for f in old.field(place).type.value_type if f.name not in CALLS])
    field = pa.field("turns", pa.list_(pa.field("item", kind, nullable=False)), nullable=False)
    turns = [
        [{k: v for k, v in turn.items() if k not in CALLS} for turn in turns]
        for turns in old.column("turns").to_pylist()
    ]
    return old.set_column(place, field, pa.array(turns, field.type))


def test_turns_from_before_tool_calls_were_counted_have_no_number_of_them() -> None:
    (made,) = trajectories([(3, [4, 2])])
    old = of_version_5_and_without_calls(made)
    read = current(old)
    assert read.schema.equals(made.schema, check_metadata=True)
    (turn,) = read.column("turns")[0].as_py()
    assert {name: turn[name] for name in CALLS} == {"calls": None, "failed": None}
    assert tool_calls(read) == tool_calls(old) == (0, 0)
    assert read.drop_columns(["turns"]).equals(made.drop_columns(["turns"]))


def of_version_6(batch: pa.RecordBatch) -> pa.RecordBatch:
    """As it was written before there were contexts of a scorer."""
    old = batch.drop_columns(["context_ids", "answer_begin", "answer_end"])
    return old.replace_schema_metadata({VERSION_KEY: b"6"})


def of_version_5(batch: pa.RecordBatch) -> pa.RecordBatch:
    """As it was written before there were segments."""
    old = of_version_6(batch).drop_columns(["segments"])
    return old.replace_schema_metadata({VERSION_KEY: b"5"})


@pytest.mark.parametrize("written", [of_version_5, of_version_6])
def test_an_older_log_is_read_and_gone_on_with(written: Any, tmp_path: Path) -> None:
    first, second = trajectories([(3, [4, 2]), (2, [1])])
    old = written(first)
    check_schema(old.schema)
    log = TrajectoryLog(tmp_path, old.schema)
    log.append(old)
    del log
    log = TrajectoryLog(tmp_path, trajectory_schema(["test"]))
    log.append(second)
    log.close()
    assert len(segments(tmp_path)) == 2
    found = list(read_log(tmp_path))
    assert found[0].schema.equals(found[1].schema, check_metadata=True)
    assert found[0].to_pylist() == first.to_pylist()
    assert found[1].equals(second)
    assert current(second) is second
