"""Programs that cheat get nothing, behind every set of walls that this host offers."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import attacks
import pytest
from attack_table import PAGE, with_table
from attacks import ATTACKS, HONEST, SECRET, TESTS, Attack, play, sandbox_behind, wrong

from actors.sandbox.sandbox import RuleSpec, Sandbox, Task
from actors.sandbox.walls import Walls, find_walls
from actors.verifiers.registry import JUDGE
from common.errors import UserError
from common.supervision.processes import descendants


def wait_until_gone(pids: list[int], limit_s: float = 5.0) -> list[int]:
    deadline = time.monotonic() + limit_s
    while (left := [pid for pid in pids if lives(pid)]) and time.monotonic() < deadline:
        time.sleep(0.02)
    return left


def lives(pid: int) -> bool:
    """A zombie that waits for somebody else's parent does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def runners() -> list[int]:
    """The interpreters that run programs for this process: not bubblewrap, the guardian, or a
    program."""
    found = {}
    for pid in descendants(os.getpid()):
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
            if words[1:4] == [b"-P", b"-m", b"actors.sandbox.runner"]:
                found[pid] = parent
    return [pid for pid, parent in found.items() if parent not in found]


LESS = ["", "user", "bubblewrap", "bubblewrap,user"]
"""Walls that the host pretends not to offer; the last is a container without privileges."""


@pytest.fixture(scope="module", params=LESS, ids=lambda less: f"without {less or 'nothing'}")
def sandbox(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Sandbox]:
    walls = find_walls(frozenset(request.param.split(",")) - {""})
    if walls.gaps():
        pytest.skip(f"refused here: {walls.gaps()}")
    decoy = tmp_path_factory.mktemp("decoy") / "decoy-of-grpo-lambda"
    decoy.write_text(SECRET)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRPO_LAMBDA_SECRET", SECRET)
        sandbox = sandbox_behind(walls)
        yield sandbox
        pids = [sandbox.pid, *runners()]
        pids += [below for pid in pids for below in descendants(pid)]
        folders = sandbox.folders
        sandbox.close()
    assert wait_until_gone(pids) == []
    assert not [folder for folder in folders if Path(folder).exists()]


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
def test_an_attack_gets_nothing_and_the_next_program_pays_nothing(
    sandbox: Sandbox, attack: Attack
) -> None:
    assert not wrong(attack, *play(sandbox, attack))


def test_descriptors_that_others_of_the_user_have_under_way_stop_no_program(
    sandbox: Sandbox,
) -> None:
    """Linux counts those of all processes of a user against the limit of the one that sends."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        for _ in range(3):
            socket.send_fds(ours, [b"x"], [ours.fileno()] * 100)
        task = Task(0, f"```python\n{HONEST}\n```", json.dumps({"tests": TESTS["sum"]}))
        for verdict in sandbox.score([task] * 2):
            assert verdict.kind == "pass", verdict


def test_a_runner_that_dies_is_the_programs_doing_and_is_replaced(sandbox: Sandbox) -> None:
    """No program is known that kills it; here the test does, while one runs."""
    sandbox.wait_ready()
    (victim,) = runners()
    killer = threading.Timer(0.6, os.kill, (victim, signal.SIGKILL))
    killer.start()
    sleeper = "import time\ntime.sleep(2.5)\n" + HONEST
    first, second = play(sandbox, Attack("", "sum", sleeper, ""))
    killer.join()
    assert (first.kind, first.suspicious) == ("fail", "judge")
    assert "ended the process that ran it" in first.reason
    assert second.kind == "pass"
    assert victim not in runners()


def test_no_program_runs_where_it_could_reach_its_judge_unless_it_is_trusted() -> None:
    bare = Walls(calls=True, landlock=0)
    rules = [RuleSpec("code", "code_tests", {})]
    sandbox = Sandbox(JUDGE, rules, 5.0, walls=bare)
    try:
        with pytest.raises(UserError, match=r"verifier\.sandbox=trusted"):
            sandbox.wait_ready()
    finally:
        sandbox.close()
    sandbox = Sandbox(JUDGE, rules, 20.0, walls=bare, trusted=True)
    try:
        task = Task(0, f"```python\n{HONEST}\n```", json.dumps({"tests": TESTS["sum"]}))
        assert sandbox.score([task])[0].kind == "pass"
    finally:
        sandbox.close()


def test_a_host_without_bubblewrap_is_seen_as_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_walls.__wrapped__(frozenset()).bubblewrap is None
    (tmp_path / "bwrap").write_text("#!/bin/false\n")  # installed, and not allowed anything
    (tmp_path / "bwrap").chmod(0o755)
    assert find_walls.__wrapped__(frozenset()).bubblewrap is None


@pytest.mark.timeout(600)
@pytest.mark.parametrize("less", ["", "bubblewrap", "user namespaces"])
def test_the_same_holds_for_an_ordinary_user(less: str) -> None:
    """Without user namespaces, as in most containers, bubblewrap is there and of no use."""
    if os.geteuid() != 0 or not shutil.which("bwrap") or not shutil.which("setpriv"):
        pytest.skip("needs root to become an ordinary user, bubblewrap and setpriv")
    # Python may lie in root's home: everything is shown again under folders that are open.
    above = [str(parent) for parent in reversed(Path(sys.base_prefix).parents)]
    home = ["--tmpfs", "/root"]
    for folder in above:
        home += ["--perms", "0755", "--dir", folder] if folder.startswith("/root/") else []
    home += ["--ro-bind", sys.base_prefix, sys.base_prefix] if len(home) > 2 else []
    script = [sys.executable, attacks.__file__, less.replace("user namespaces", "")]
    if less == "user namespaces":
        closed = ["bwrap", "--unshare-user", "--disable-userns", "--dev-bind", "/", "/", "--"]
        script = [*closed, *script]
    # Not in a namespace of users: an ordinary user makes its own, if it may.
    done = subprocess.run(
        [
            *("bwrap", "--dev-bind", "/", "/", *home, "--tmpfs", "/tmp"),
            *("--perms", "1777", "--dir", "/tmp/open", "--setenv", "TMPDIR", "/tmp/open", "--"),
            *("setpriv", "--reuid", "4711", "--regid", "4711", "--clear-groups", *script),
        ],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "HOME": "/tmp/open"},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert ("of its own" in told["walls"][0]) == (not less)
    assert told["user"] == 4711
    assert told["gaps"] == []
    assert told["wrong"] == []


def test_the_table_in_the_readme_is_that_of_the_attacks() -> None:
    text = PAGE.read_text()
    assert with_table(text) == text, "run `python tests/support/attack_table.py`"
