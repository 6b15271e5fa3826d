"""The tool `python`: what a program prints, and what it cannot do."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest
from environment_hosts import Played, playing

from actors.environments.base import Reply, ToolCall
from actors.environments.host import Observation
from actors.sandbox.walls import find_walls

SECRET = secrets.token_hex(8)

pytestmark = pytest.mark.skipif(
    not (find_walls().calls and find_walls().landlock), reason="programs are refused without walls"
)


@pytest.fixture(scope="module")
def tool() -> Iterator[Played]:
    with playing("python", {"timeout_s": 1.0, "output_characters": 300}) as played:
        yield played


@pytest.fixture
def episode(tool: Played) -> Iterator[str]:
    key, _ = tool.begin({"prompt": "?", "answer": SECRET})
    yield key
    tool.close(key)


def ran(tool: Played, key: str, code: str) -> str:
    answer = tool.step(key, Reply("", [ToolCall("python", {"code": code})]))
    assert isinstance(answer, Observation), answer
    assert not answer.results[0].failed
    return answer.text


@pytest.mark.parametrize(
    ("code", "output"),
    [
        ("print(6 * 7)", "42\n"),
        ("x = 6\nx * 7", "42\n"),
        ("'text'", "'text'\n"),
        ("None", ""),
        ("x = 1", ""),
        ("", ""),
        ("for n in range(3):\n    print(n, end=' ')\nn + 1", "0 1 2 3\n"),
        ("import math\nmath.comb(5, 2)", "10\n"),
        ("print('ü\u2028')", "ü\u2028\n"),
        ("import sys; sys.stdin.read()", "''\n"),
    ],
)
def test_what_a_program_prints_is_what_is_observed(
    tool: Played, episode: str, code: str, output: str
) -> None:
    assert ran(tool, episode, code) == output


@pytest.mark.parametrize(
    ("code", "end"),
    [
        ("print('first')\n1 / 0", "ZeroDivisionError: division by zero\n"),
        ("def f(:", "SyntaxError: invalid syntax\n"),
        ("while True: pass", "error: time limit (1 s)"),
        ("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)", "error: exit status -9"),
        ("import os\nos.fork()", "PermissionError: [Errno 13] Permission denied\n"),
        ("import os\nos.kill(os.getppid(), 9)", "PermissionError: [Errno 13] Permission denied\n"),
        ("import socket\nsocket.socket()", "PermissionError: [Errno 13] Permission denied\n"),
        ("open('made', 'w')", "Permission denied: 'made'\n"),
        ("open('/etc/passwd')", "Permission denied: '/etc/passwd'\n"),
        (f"open({str(Path(__file__))!r})", f"Permission denied: {str(Path(__file__))!r}\n"),
        ("print('x' * 10**6)", "x" * 149 + "\n"),
    ],
)
def test_what_goes_wrong_is_told_and_the_next_program_runs(
    tool: Played, episode: str, code: str, end: str
) -> None:
    assert ran(tool, episode, code).endswith(end)
    assert ran(tool, episode, "'still here'") == "'still here'\n"


def test_a_traceback_is_that_of_the_program_alone(tool: Played, episode: str) -> None:
    said = ran(tool, episode, "def f():\n    return {}['key']\nf()")
    assert said.splitlines()[0] == "Traceback (most recent call last):"
    assert said.count("  File ") == said.count('  File "program.py"') == 2
    assert "    return {}['key']\n" in said


def test_nothing_is_kept_from_one_program_to_the_next(tool: Played, episode: str) -> None:
    ran(tool, episode, "import builtins; x = builtins.x = 1")
    assert "NameError: name 'x' is not defined" in ran(tool, episode, "x")


def test_a_program_does_not_find_what_its_episode_knows(tool: Played, episode: str) -> None:
    """Neither among the objects of its interpreter, nor in its memory or that of others."""
    head, tail = SECRET[:8], SECRET[8:]
    search = f"""
import gc, os
wanted = {head!r} + {tail!r}
def inside(value, depth=3):
    if isinstance(value, str):
        return wanted in value and value is not wanted
    if depth and isinstance(value, dict):
        return any(inside(v, depth - 1) for v in [*value.values()])
    if depth and isinstance(value, (list, tuple, set)):
        return any(inside(v, depth - 1) for v in [*value])
    return False
mine = globals()
found = [type(o) for o in gc.get_objects() if o is not mine and inside(o)]
opened = []
for pid in ["self", os.getppid(), *range(1, 200)]:
    try:
        opened.append(open(f"/proc/{{pid}}/mem", "rb"))
    except OSError:
        pass
print(found, opened)
"""
    assert ran(tool, episode, search) == "[] []\n"


def test_it_is_refused_where_walls_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    from actors.environments import worker
    from common.errors import UserError

    walls = find_walls(frozenset({"landlock"}))
    monkeypatch.setattr(worker, "find_walls", lambda: walls)
    with pytest.raises(UserError, match="not safe to run here.*Landlock"), playing("python"):
        pass
    with playing("guess"):  # which runs no programs
        pass
