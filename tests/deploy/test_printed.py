"""What processes print: the newest is kept, nothing is lost, and disks do not fill."""

from __future__ import annotations

from pathlib import Path

import pytest

from deploy.run import printed

KEPT = 2**16


def numbers(path: Path) -> list[int]:
    """Of the lines that are whole: the first may be cut."""
    return [int(line) for line in path.read_text().splitlines()[1:]]


def test_the_newest_is_kept_without_a_gap_and_the_disk_gets_the_rest(tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    logs.mkdir()
    path = logs / "worker-1.out"
    with path.open("a") as writer:
        for number in range(100_000):
            print(f"{number:07d}", file=writer)
            if number % 20_000 == 0:  # its writer goes on, and knows nothing of it
                writer.flush()
                printed.cut(path, KEPT)
        writer.flush()
        printed.cut(path, KEPT)
    assert path.stat().st_blocks * 512 <= KEPT + 2 * 4096 < path.stat().st_size
    printed.copy_printed(logs, tmp_path / "log")
    kept = numbers(tmp_path / "log" / "worker-1.out")
    assert kept == list(range(kept[0], 100_000))
    assert (tmp_path / "log" / "worker-1.out").stat().st_size >= KEPT


def test_what_is_short_is_copied_as_it_is_and_what_is_empty_is_not(tmp_path: Path) -> None:
    (tmp_path / "worker-1.err").write_text("first\nsecond\n")
    (tmp_path / "worker-2.err").touch()
    printed.cut(tmp_path / "worker-1.err", KEPT)
    printed.copy_printed(tmp_path, tmp_path / "log")
    assert [path.name for path in (tmp_path / "log").iterdir()] == ["worker-1.err"]
    assert (tmp_path / "log" / "worker-1.err").read_text() == "first\nsecond\n"


def test_files_are_cut_while_a_run_goes_on_and_no_longer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(printed, "_LOOK_S", 0.01)
    path = tmp_path / "worker-1.out"
    path.write_bytes(b"x" * 4 * KEPT)
    cutter = printed.Cutter(tmp_path, KEPT)
    for _ in range(1000):
        if path.stat().st_blocks * 512 <= KEPT:
            break
        cutter._thread.join(0.01)
    monkeypatch.setattr(printed, "_LOOK_S", 30.0)
    cutter.stop()
    assert path.stat().st_blocks * 512 <= KEPT
    assert not cutter._thread.is_alive()


def test_a_disk_that_cannot_cut_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(path: Path, newest: int) -> None:
        raise OSError(95, "Operation not supported", str(path))

    monkeypatch.setattr(printed, "_LOOK_S", 0.01)
    monkeypatch.setattr(printed, "cut", refuse)
    (tmp_path / "worker-1.out").touch()
    printed.Cutter(tmp_path, KEPT)._thread.join(10)
    assert "grows in" in capsys.readouterr().err
