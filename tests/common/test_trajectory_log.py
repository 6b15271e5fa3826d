"""The trajectory log: what was appended can be read, whatever happened to the writer."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from made_up_groups import group

from common.record import trajectory_log, writer
from common.record.schema import check_schema, rollout_schema, trajectory_schema
from common.record.trajectory_log import TrajectoryLog, read_log, read_segment, segments
from common.record.writer import TrajectoryLogWriter, receipt


def test_what_is_appended_is_read_back_in_order(tmp_path: Path) -> None:
    log = TrajectoryLog(tmp_path, rollout_schema())
    for index in range(5):
        log.append(group(index))
    # Readable while the segment is still open: the inspector reads a live run.
    assert [batch.column("group_id")[0].as_py() for batch in read_log(tmp_path)] == [0, 1, 2, 3, 4]
    log.close()
    read, written = list(read_log(tmp_path))[3], group(3)
    for name in set(written.schema.names) - {"finished_s"}:  # the clock of the moment
        assert read.column(name).equals(written.column(name)), name
    table = pq.read_table(segments(tmp_path)[0].with_suffix(".parquet"))
    assert table.column("group_id").to_pylist() == [i for i in range(5) for _ in range(2)]


def test_a_twin_is_written_in_pieces_and_holds_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a whole it took a hundred megabytes, which the log's process kept."""
    monkeypatch.setattr(trajectory_log, "_PIECE_BYTES", 3 * group(0).nbytes)
    log = TrajectoryLog(tmp_path, rollout_schema())
    for index in range(8):
        log.append(group(index))
    log.close()
    (segment,) = segments(tmp_path)
    twin = pq.ParquetFile(segment.with_suffix(".parquet"))
    rows = [twin.metadata.row_group(number).num_rows for number in range(twin.num_row_groups)]
    assert rows == [3 * 2, 3 * 2, 2 * 2]
    assert twin.read().equals(pa.Table.from_batches(read_segment(segment)))


def test_segments_rotate_by_size_and_a_new_writer_starts_a_new_one(tmp_path: Path) -> None:
    log = TrajectoryLog(tmp_path, rollout_schema(), segment_bytes=1)
    log.append(group(0))
    log.append(group(1))
    again = TrajectoryLog(tmp_path, rollout_schema())
    again.append(group(2))
    again.close()
    assert len(segments(tmp_path)) == 3
    assert [batch.column("group_id")[0].as_py() for batch in read_log(tmp_path)] == [0, 1, 2]


@pytest.mark.parametrize("gone", ["segment-000000.arrow", "segment-000001.arrow"])
def test_a_writer_writes_over_no_segment_when_one_was_removed(tmp_path: Path, gone: str) -> None:
    log = TrajectoryLog(tmp_path, rollout_schema(), segment_bytes=1)
    for index in range(2):
        log.append(group(index))
    log.close()
    (tmp_path / gone).unlink()  # its Parquet twin stays
    left = [path.read_bytes() for path in segments(tmp_path)]
    again = TrajectoryLog(tmp_path, rollout_schema())
    again.append(group(2))
    again.close()
    assert [path.read_bytes() for path in segments(tmp_path)[:-1]] == left
    assert segments(tmp_path)[-1].name == "segment-000002.arrow"


@pytest.mark.parametrize("cut", [1, 10, 100, 200])
def test_a_torn_tail_costs_only_the_torn_group(tmp_path: Path, cut: int) -> None:
    log = TrajectoryLog(tmp_path, rollout_schema())
    log.append(group(0))
    whole = segments(tmp_path)[0].stat().st_size
    log.append(group(1))
    path = segments(tmp_path)[0]
    data = path.read_bytes()
    path.write_bytes(data[: max(whole, len(data) - cut)])
    assert [batch.column("group_id")[0].as_py() for batch in read_segment(path)] == [0]


def test_an_empty_segment_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "segment-000000.arrow").write_bytes(b"")
    assert list(read_log(tmp_path)) == []


def test_data_of_another_schema_version_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="schema version None, expected"):
        check_schema(pa.schema([pa.field("x", pa.int32())]))


def test_an_evaluation_is_counted_by_data_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "get_all", lambda batches, _: batches)
    batch = group(3)
    batch = batch.set_column(
        batch.schema.get_field_index("source"), batch.schema.field("source"), pa.array(["a", "b"])
    )
    judged = pa.RecordBatch.from_arrays(
        [*batch.columns, *_columns([1.0, None]), pa.array(["", ""])],
        schema=trajectory_schema(["rule"]),
    )
    found = TrajectoryLogWriter(str(tmp_path), ["rule"]).write_evaluation(2, [judged, judged])
    assert found == {
        "eval/accuracy": 0.5,
        "eval/unscored": 2.0,
        "eval/length": 2.0,
        "source/a/eval_accuracy": 1.0,
        "source/a/eval_unscored": 0.0,
        "source/b/eval_accuracy": 0.0,
        "source/b/eval_unscored": 2.0,
    }


def _columns(rewards: list[float | None]) -> list[pa.Array]:
    """A rule's reward and verdict, then reward and accuracy in all."""
    of_rule = pa.array(rewards, pa.float32())
    kinds = pa.array(["error" if reward is None else "pass" for reward in rewards])
    return [of_rule, kinds, of_rule, of_rule]


def test_a_receipt_sums_the_group_up() -> None:
    batch = group(9)
    rewards = pa.array([None, 1.0], pa.float32())
    verified = pa.RecordBatch.from_arrays(
        [*batch.columns, rewards, rewards, pa.array(["", "files"])],
        names=[*batch.schema.names, "reward", "accuracy", "suspicious"],
    )
    summed = receipt(verified, "ref")
    assert (summed.group_id, summed.num_completions, summed.num_tokens) == (9, 2, 4)
    assert (summed.dispatch_version, summed.min_version) == (4, 4)
    assert (summed.reward_mean, summed.num_unscored, summed.rewards_equal) == (1.0, 1, True)
