"""Disks that are full, read-only or damaged: what was written stays readable, the rest is said."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest
from made_up_groups import group, request
from mounts import remount, small_disk

from common.errors import RunError, UserError
from common.record.ledger import Ledger
from common.record.manifest import damage, seal
from common.record.trajectory_log import TrajectoryLog, read_log, segments
from common.record.writer import receipt
from deploy.run.directory import RunDirectory


def group_ids(folder: Path) -> list[int]:
    return [batch.column("group_id")[0].as_py() for batch in read_log(folder)]


def test_a_full_disk_loses_no_group_that_was_acknowledged(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", kib=256) as disk:
        log = TrajectoryLog(disk / "trajectories", group(0).schema)
        written = []
        with pytest.raises(OSError, match="No space left"):
            for index in range(1000):
                log.append(group(index, tokens=200))
                written.append(index)
        assert len(written) > 5
        assert group_ids(disk / "trajectories") == written
        remount(disk, "size=1024k")
        again = TrajectoryLog(disk / "trajectories", group(0).schema)
        again.append(group(1000))
        assert group_ids(disk / "trajectories") == [*written, 1000]


def test_a_ledger_on_a_full_disk_says_what_to_do_and_stays_whole(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", kib=256) as disk:
        ledger, written = Ledger(disk / "ledger.sqlite", "p"), 0
        with pytest.raises(RunError, match=r"cannot be written.*Make room.*resume="):
            for written in range(100_000):
                ledger.dispatched(request(written, written))
        remount(disk, "size=4096k")
        assert written - 1 <= Ledger(disk / "ledger.sqlite", "p").next_group_id() - 1 <= written


def test_a_checkpoint_on_a_full_disk_is_not_one(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", kib=64) as disk:
        folder = disk / "step-1"
        folder.mkdir()
        (folder / "weights").write_bytes(b"x" * 50_000)
        with pytest.raises(OSError, match="No space left"):
            (folder / "more").write_bytes(b"x" * 50_000)
            seal(folder)
        assert damage(folder) is not None


def test_a_read_only_run_directory_is_a_user_error(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", kib=256) as disk:
        run = disk / "run"
        run.mkdir()
        (run / "config.yaml").write_text("")
        remount(disk, "ro")
        with pytest.raises(UserError, match="cannot write to .*run: Read-only file system"):
            RunDirectory.reopen(str(run))


def begins(content: bytearray, at: int) -> bool:
    """Whether a message of Arrow begins there: a mark, which data may hold too, and a length."""
    length = int.from_bytes(content[at + 4 : at + 8], "little")
    return content[at : at + 4] == b"\xff" * 4 and at % 8 == 0 and 0 < length < 2**16


@pytest.mark.parametrize("place", [0.3, 0.6])
def test_a_damaged_segment_is_read_up_to_the_damage(tmp_path: Path, place: float) -> None:
    """The groups behind it are then missing in the log: a resume samples them again."""
    log = TrajectoryLog(tmp_path, group(0).schema)
    for index in range(20):
        log.append(group(index))
    (path,) = segments(tmp_path)
    content = bytearray(path.read_bytes())
    start = next(at for at in range(int(len(content) * place), len(content)) if begins(content, at))
    content[start : start + 8] = b"\x00\x01\x02\x03\x04\x05\x06\x07"
    path.write_bytes(content)
    found = group_ids(tmp_path)
    assert found == list(range(len(found)))
    assert 0 < len(found) < 20


def test_a_clock_that_is_set_back_makes_no_negative_time() -> None:
    batch = group(0)
    at = batch.schema.get_field_index("dispatched_s")
    later = [value.as_py() + 1e10 for value in batch.column(at)]
    batch = batch.set_column(at, batch.schema.field(at), pa.array(later))
    with_rewards = batch.append_column("reward", pa.array([1.0, 0.0]))
    with_rewards = with_rewards.append_column("accuracy", pa.array([1.0, 0.0]))
    with_rewards = with_rewards.append_column("suspicious", pa.array(["", ""]))
    assert receipt(with_rewards, None).generate_s == 0.0
