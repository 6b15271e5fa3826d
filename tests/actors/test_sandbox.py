"""Rules that misbehave cost their own completion its verdict, and nothing else."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from actors.sandbox.sandbox import RuleSpec, Sandbox, Task
from actors.sandbox.walls import find_walls
from actors.verifiers.registry import JUDGE
from common.errors import RunError, UserError, VerifierError
from common.supervision.processes import descendants

TIMEOUT_S = 0.5
HOSTILE = RuleSpec("hostile", "hostile_verifiers:hostile", {})


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    sandbox = Sandbox(JUDGE, [HOSTILE], TIMEOUT_S)
    yield sandbox
    sandbox.close()


def alive(pid: int) -> bool:
    """Whether `pid` runs; a zombie waiting for a parent that never looks does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until_gone(pids: list[int], limit_s: float = 5.0) -> list[int]:
    deadline = time.monotonic() + limit_s
    while (left := [pid for pid in pids if alive(pid)]) and time.monotonic() < deadline:
        time.sleep(0.02)
    return left


def kinds(sandbox: Sandbox, *texts: str) -> list[str]:
    return [verdict.kind for verdict in sandbox.score([Task(0, text, "{}") for text in texts])]


@pytest.mark.parametrize(
    ("text", "kind", "reason"),
    [
        ("number 0.5", "pass", ""),
        ("number 0", "fail", ""),
        ("bool", "pass", ""),
        ("loop", "timeout", "no verdict within 0.5 s"),
        ("sleep 60", "timeout", "no verdict within 0.5 s"),
        ("hold", "timeout", "no verdict within 0.5 s"),
        ("raise", "error", "KeyError"),
        ("sys_exit", "error", "SystemExit"),
        ("exit 0", "error", "exit status 0"),
        ("exit 7", "error", "exit status 7"),
        ("segfault", "error", "SIGSEGV"),
        ("nan", "error", "nan, not a finite number"),
        ("inf", "error", "inf, not a finite number"),
        ("string", "error", "str, not a number"),
        ("none", "error", "NoneType, not a number"),
        ("allocate", "error", "MemoryError"),
        ("write_everywhere", "error", "ended its process"),
        ("fork", "pass", ""),
        ("fork_bomb", "error", "more than 32 processes"),
        ("flood", "pass", ""),
        ("read", "fail", ""),
        ("alarm", "pass", ""),
        ("main_thread", "pass", ""),
        ("connect AF_INET", "error", "PermissionError"),
        ("connect AF_INET6", "error", "PermissionError"),
        ("connect AF_UNIX", "pass", ""),
        ("child_connects", "fail", ""),
        ("write_file 1000", "pass", ""),
        ("write_file 70000000", "error", "File too large"),
        ("open_files 2000", "error", "hostile"),
        ("list_folder", "fail", ""),
    ],
)
def test_a_bad_rule_costs_one_verdict(sandbox: Sandbox, text: str, kind: str, reason: str) -> None:
    tasks = [Task(0, t, "{}") for t in ("number 1", text, "number 0", "number 2")]
    before, verdict, *after = sandbox.score(tasks)
    assert (before.reward, [v.reward for v in after]) == (1.0, [0.0, 2.0])
    assert verdict.kind == kind
    assert reason in verdict.reason
    if kind in ("error", "timeout"):
        assert verdict.reward is None
        assert verdict.reason.startswith("hostile")


@pytest.mark.parametrize("less", ["", "user", "bubblewrap", "bubblewrap,user"])
def test_the_memory_of_all_its_processes_is_counted_once(less: str) -> None:
    walls = find_walls(frozenset(less.split(",")) - {""})
    sandbox = Sandbox(JUDGE, [HOSTILE], 10.0, 2**30, walls=walls)
    try:
        texts = (f"fork_and_share {2**28}", f"fork_and_allocate {2**29}", "number 1")
        shared, together, after = sandbox.score([Task(0, text, "{}") for text in texts])
    finally:
        sandbox.close()
    assert shared.kind == "pass", shared
    assert (together.kind, after.kind) == ("error", "pass")
    assert "more than 1 GiB of memory" in together.reason


def test_the_network_is_open_to_those_who_ask_for_it() -> None:
    sandbox = Sandbox(JUDGE, [HOSTILE], TIMEOUT_S, network=True)
    try:
        assert kinds(sandbox, "connect AF_INET", "child_connects") == ["pass", "pass"]
    finally:
        sandbox.close()


def test_every_completion_has_the_whole_limit(sandbox: Sandbox) -> None:
    assert kinds(sandbox, *["sleep 0.3"] * 4) == ["pass"] * 4


def test_the_limit_is_the_limit(sandbox: Sandbox) -> None:
    sandbox.wait_ready()
    start = time.monotonic()
    assert kinds(sandbox, "loop") == ["timeout"]
    assert TIMEOUT_S <= time.monotonic() - start < TIMEOUT_S + 5.0


def test_an_alarm_left_behind_does_not_hit_the_next_completion() -> None:
    sandbox = Sandbox(JUDGE, [HOSTILE], timeout_s=5.0)
    try:
        assert kinds(sandbox, "alarm", "sleep 1.2") == ["pass", "pass"]
    finally:
        sandbox.close()


@pytest.mark.parametrize(("action", "kind"), [("leave", "pass"), ("leave_and_loop", "timeout")])
def test_processes_left_behind_are_ended(sandbox: Sandbox, action: str, kind: str) -> None:
    assert kinds(sandbox, f"{action} 321.5") == [kind]
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True)
    assert "321.5" not in listed.stdout


def test_a_child_that_died_between_groups_blames_nobody(sandbox: Sandbox) -> None:
    sandbox.wait_ready()
    for pause_s in (0.0, 0.001, 0.5):
        os.kill(sandbox.pid, signal.SIGKILL)
        time.sleep(pause_s)
        assert kinds(sandbox, "number 1") == ["pass"]


def test_no_secret_is_inherited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("MY_API_KEY", "secret")
    sandbox = Sandbox(JUDGE, [HOSTILE], TIMEOUT_S)
    try:
        names = ("HF_TOKEN", "MY_API_KEY", "PATH")
        texts = [f"environment {name}" for name in names]
        assert kinds(sandbox, *texts) == ["fail", "fail", "pass"]
    finally:
        sandbox.close()


def test_the_child_imports_from_the_parents_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "shipped_rule.py").write_text("def score(text, reference):\n    return 1.0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    sandbox = Sandbox(JUDGE, [RuleSpec("mine", "shipped_rule:score", {})], TIMEOUT_S)
    try:
        assert kinds(sandbox, "x") == ["pass"]
    finally:
        sandbox.close()


def test_large_groups_and_any_text_go_through(sandbox: Sandbox) -> None:
    long = "number 1" + " " * 300_000
    assert kinds(sandbox, *[long] * 8) == ["pass"] * 8
    assert kinds(sandbox, "number 1\x00", "number \ud800", "number \u0661") == [
        "error",
        "error",
        "pass",
    ]


def test_a_reference_that_is_not_json_is_an_error(sandbox: Sandbox) -> None:
    assert sandbox.score([Task(0, "number 1", "{")])[0].kind == "error"


def test_a_rule_that_cannot_be_used_is_a_user_error() -> None:
    sandbox = Sandbox(JUDGE, [RuleSpec("x", "no_such_module:score", {})], TIMEOUT_S)
    with pytest.raises(UserError, match="no_such_module"):
        sandbox.wait_ready()
    assert wait_until_gone([sandbox.pid]) == []
    sandbox.close()


def test_a_module_that_takes_too_long_to_import_ends_the_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "slow_rule.py").write_text("import time\ntime.sleep(60)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    sandbox = Sandbox(JUDGE, [RuleSpec("x", "slow_rule:score", {})], TIMEOUT_S, start_timeout_s=1.0)
    with pytest.raises(VerifierError, match="not ready within 1 s"):
        sandbox.wait_ready()
    pids = [sandbox.pid, *descendants(sandbox.pid)]
    sandbox.close()
    assert wait_until_gone(pids) == []


def test_close_ends_everything_and_interrupts_a_group() -> None:
    sandbox = Sandbox(JUDGE, [HOSTILE], timeout_s=60.0)
    sandbox.wait_ready()
    pids = [sandbox.pid, *descendants(sandbox.pid)]
    assert len(pids) == 2 + find_walls().processes_between  # the child and its guardian
    closer = threading.Timer(0.3, sandbox.close)
    closer.start()
    with pytest.raises(RunError, match="closed"):
        kinds(sandbox, "loop")
    closer.join()
    sandbox.close()
    assert wait_until_gone(pids) == []


PARENT = """
import sys, threading, time
from actors.sandbox.sandbox import RuleSpec, Sandbox, Task
from actors.verifiers.registry import JUDGE
from common.supervision.processes import descendants
sandbox = Sandbox(JUDGE, [RuleSpec("hostile", "hostile_verifiers:hostile", {})], 60.0)
sandbox.wait_ready()
task = Task(0, sys.argv[1], "{}")
threading.Thread(target=sandbox.score, args=([task],), daemon=True).start()
time.sleep(0.5)
print(*[sandbox.pid, *descendants(sandbox.pid)], flush=True)
print(*sandbox.folders, flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("text", ["number 1", "loop", "hold", "sleep 60"])
def test_nothing_outlives_a_parent_that_was_killed(text: str) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, text], stdout=subprocess.PIPE, env=environment
    )
    assert parent.stdout is not None
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(pids) >= 2
    folder = Path(parent.stdout.readline().decode().strip())
    parent.kill()
    parent.wait(timeout=5)
    parent.stdout.close()
    assert wait_until_gone(pids) == []
    assert folder.name.startswith("grpo-lambda-verifier-")
    assert not folder.exists()


def test_nothing_outlives_a_sandbox_nobody_closed() -> None:
    sandbox = Sandbox(JUDGE, [HOSTILE], TIMEOUT_S)
    sandbox.wait_ready()
    pids = [sandbox.pid, *descendants(sandbox.pid)]
    del sandbox
    assert wait_until_gone(pids[1:]) == []
