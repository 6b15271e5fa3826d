"""A run on one machine listens to nobody but that machine."""

from __future__ import annotations

import time
from pathlib import Path

import psutil
from run_process import finish, last_step, start


def listening(root: int) -> dict[tuple[str, str], str]:
    """Name of the process by (address, port), of every socket that `root` and those below it have
    open to connections."""
    found = {}
    above = psutil.Process(root)
    for process in (above, *above.children(recursive=True)):
        try:
            line = " ".join(process.cmdline())
            for each in process.net_connections("inet"):
                if each.status == psutil.CONN_LISTEN or (each.type.name == "SOCK_DGRAM"):
                    found[each.laddr.ip.removeprefix("::ffff:"), str(each.laddr.port)] = line
        except psutil.Error:  # it has ended
            continue
    return found


def test_a_local_run_listens_on_loopback_alone(tmp_path: Path) -> None:
    run = tmp_path / "run"
    log = tmp_path / "output"
    with log.open("w") as output:
        process = start(
            *(f"runs_dir={tmp_path}", "name=run", "steps=2", "eval.every=0", "eval.prompts=16"),
            *("learner.ranks=2", "learner.credit_probe_every=0"),
            stdout=output,
        )
        found: dict[tuple[str, str], str] = {}
        ends = time.monotonic() + 280
        while process.poll() is None and time.monotonic() < ends:
            found |= listening(process.pid)
            time.sleep(0.25)
        finish(process, 5.0)
    assert process.returncode == 0, log.read_text()
    assert last_step(run) == 2
    assert any("gcs_server" in line for line in found.values()), found  # it did look
    open_to_others = {place: line for place, line in found.items() if place[0] != "127.0.0.1"}
    assert not open_to_others
