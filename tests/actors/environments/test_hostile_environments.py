"""What a bad environment does costs its own episode the reward, and no other one anything."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from environment_hosts import Played, playing

from actors.environments.base import Reply
from actors.environments.host import EnvironmentFailure, Observation
from common.errors import UserError
from common.supervision.processes import descendants

STEP_S = 2.0
TIMEOUT = "no answer within 2 s"


@pytest.fixture(scope="module")
def hostile() -> Iterator[Played]:
    with playing("hostile_environments:Hostile", step_timeout_s=STEP_S) as played:
        yield played


@pytest.fixture
def bystander(hostile: Played) -> Iterator[str]:
    """An honest episode in the same worker."""
    key, first = hostile.begin()
    assert says(first) == "begun"
    yield key
    hostile.close(key)
    hostile.rest(0.1)


@pytest.fixture(scope="module")
def patient() -> Iterator[Played]:
    os.environ["SECRET_OF_THE_RUN"] = "a key"
    with playing("hostile_environments:Hostile", step_timeout_s=30.0) as played:
        yield played
    del os.environ["SECRET_OF_THE_RUN"]


def says(answer: object) -> str:
    assert isinstance(answer, Observation), answer
    return answer.text


def check_failure(answer: object, kind: str, reason: str) -> None:
    assert isinstance(answer, EnvironmentFailure), answer
    assert (answer.kind, reason in answer.reason) == (kind, True), answer
    assert len(answer.reason) < 700


@pytest.mark.parametrize(
    ("action", "kind", "reason"),
    [
        ("raise", "error", "KeyError: 'shelf' (hostile_environments.py:"),
        ("exit politely", "error", "SystemExit: 3"),
        ("interrupt", "error", "KeyboardInterrupt"),
        ("raise something unspeakable", "error", "Unspeakable"),
        ("raise a long story", "error", "ValueError: word word"),
        ("raise a group", "error", "ValueError: a"),
        ("exit 0", "error", "its process ended: exit status 0"),
        ("exit 7", "error", "its process ended: exit status 7"),
        ("segfault", "error", "its process ended: signal SIGSEGV"),
        ("kill itself", "error", "its process ended: signal SIGKILL"),
        ("stop itself", "timeout", TIMEOUT),
        ("loop", "timeout", TIMEOUT),
        ("sleep", "timeout", TIMEOUT),
        ("hold the interpreter", "timeout", TIMEOUT),
        ("hold signals", "timeout", TIMEOUT),
        ("await for ever", "timeout", TIMEOUT),
        ("nan", "error", "the reward is nan, not a finite number"),
        ("inf", "error", "the reward is inf, not a finite number"),
        ("minus inf", "error", "the reward is -inf, not a finite number"),
        ("too much for float32", "error", "the reward is 1e+300, not a finite number in float32"),
        ("boolean", "error", "the reward is of type bool, not a number"),
        ("text as reward", "error", "the reward is of type str, not a number"),
        ("complex", "error", "the reward is of type complex, not a number"),
        ("none", "error", "step returned a NoneType, not a Step"),
        ("a tuple", "error", "step returned a tuple, not a Step"),
        ("a dictionary", "error", "step returned a dict, not a Step"),
        ("text", "error", "step returned a str, not a Step"),
        ("bytes", "error", "the observation is of type bytes, not a text"),
        ("an object", "error", "the observation is of type object, not a text"),
        ("done is a text", "error", "done is of type str, not a boolean"),
        ("state is a number", "error", "the state is of type int, not a text"),
        ("a text that will not be measured", "error", "how long I am is my business"),
        ("write everywhere", "error", "its process sent nonsense"),
        ("announce four gigabytes", "error", "a message of 4294967295 bytes was announced"),
        ("forge an answer", "error", "an answer that nobody had asked for"),
        ("close everything", "error", "its process"),
        ("allocate", "error", "MemoryError"),
        ("connect", "error", "PermissionError"),
        ("resolve a name", "error", "PermissionError"),
        ("write a big file", "error", "OSError: [Errno 27] File too large"),
        ("recurse", "error", "RecursionError"),
    ],
)
def test_a_step_that_fails_ends_its_episode_alone(
    hostile: Played, bystander: str, action: str, kind: str, reason: str
) -> None:
    bad, _ = hostile.begin({"do": action})
    check_failure(hostile.step(bad), kind, reason)
    check_failure(hostile.step(bad), "error", "is not there")
    assert says(hostile.step(bystander, "hello")) == "you said hello"
    assert hostile.host.open_episodes == 1


def test_a_fork_bomb_ends_with_its_episode(hostile: Played, bystander: str) -> None:
    """For its processes, or, where they leave the worker no time to count, for its lateness."""
    idle = below(hostile)
    bad, _ = hostile.begin({"do": "fork bomb"})
    answer = hostile.step(bad)
    assert isinstance(answer, EnvironmentFailure)
    assert "it had more than 32 processes" in answer.reason or answer.kind == "timeout"
    wait_until_idle(hostile, idle)
    assert says(hostile.step(bystander, "hello")) == "you said hello"


@pytest.mark.parametrize(
    ("action", "text"),
    [
        ("half a character", "a?b"),
        ("a gigabyte", "characters left out"),
        ("print a gigabyte", "printed"),
        ("fork and return", "forked"),
        ("await a little", "awaited"),
        ("start a loop of its own", "awaited"),
        ("threads", "threads"),
        ("leave a daemon", "left a daemon"),
        ("secret", "nothing"),
    ],
)
def test_what_harms_nobody_is_endured(patient: Played, action: str, text: str) -> None:
    key, _ = patient.begin({"do": action})
    found = says(patient.step(key))
    assert text in found
    assert len(found) < 40 * 512
    patient.close(key)


@pytest.mark.parametrize("at", ["reset", "step", "reward"])
@pytest.mark.parametrize("action", ["raise", "loop", "exit 7"])
def test_every_verb_may_fail(hostile: Played, at: str, action: str) -> None:
    kind = "timeout" if action == "loop" else "error"
    key, first = hostile.begin({"do": action, "at": at})
    if at == "reset":
        check_failure(first, kind, "reset: ")
    elif at == "step":
        check_failure(hostile.step(key), kind, "step: ")
    else:
        says(hostile.step(key))
        check_failure(hostile.reward(key), kind, "reward: ")


@pytest.mark.parametrize("action", ["number", "a dictionary", "bytes"])
def test_a_first_observation_is_a_text(hostile: Played, action: str) -> None:
    check_failure(hostile.begin({"do": action, "at": "reset"})[1], "error", "first observation")


def test_none_is_no_first_observation(hostile: Played) -> None:
    key, first = hostile.begin({"do": "none", "at": "reset"})
    assert says(first) == ""
    hostile.close(key)


@pytest.mark.parametrize("action", ["text", "number"])
def test_a_last_word_is_a_number(hostile: Played, action: str) -> None:
    key, _ = hostile.begin({"do": action, "at": "reward"})
    answer = hostile.reward(key)
    if action == "number":
        assert isinstance(answer, Observation)
        assert answer.reward == 3.0
    else:
        check_failure(answer, "error", "the reward is of type str")
    hostile.close(key)


def below(hostile: Played) -> int:
    (worker,) = hostile.host.pids
    return len(descendants(worker))


def wait_until_idle(hostile: Played, idle: int) -> None:
    deadline = time.monotonic() + 20
    while below(hostile) > idle and time.monotonic() < deadline:
        hostile.rest(0.05)
    assert below(hostile) == idle


@pytest.mark.parametrize("action", ["leave a sleeper", "leave a daemon", "threads", "loop"])
def test_nothing_is_left_of_an_episode(hostile: Played, action: str) -> None:
    key, _ = hostile.begin()
    hostile.close(key)
    hostile.rest(0.2)
    idle = below(hostile)
    key, _ = hostile.begin({"do": action})
    hostile.step(key)
    hostile.close(key)
    wait_until_idle(hostile, idle)


@pytest.mark.parametrize("action", ["loop", "raise", "exit 7"])
def test_a_close_that_fails_ends_all_the_same(hostile: Played, action: str) -> None:
    hostile.rest(0.2)
    idle = below(hostile)
    key, _ = hostile.begin({"do": action, "at": "close"})
    hostile.close(key)
    assert hostile.host.open_episodes == 0
    wait_until_idle(hostile, idle)


def test_episodes_share_nothing(hostile: Played) -> None:
    """Two at once and one behind them: no module's state, no file is the other's."""
    for action, first in (("count", "count 1"), ("leave a file", "found []")):
        one, other = hostile.begin({"do": action})[0], hostile.begin({"do": action})[0]
        assert says(hostile.step(one)) == says(hostile.step(other)) == first
        assert says(hostile.step(one)) != first
        hostile.close(one)
        hostile.close(other)
        late, _ = hostile.begin({"do": action})
        assert says(hostile.step(late)) == first
        hostile.close(late)


def test_a_call_that_is_cancelled_leaves_nothing_open(hostile: Played) -> None:
    hostile.rest(0.2)
    idle = below(hostile)
    key, _ = hostile.begin({"do": "sleep"})

    async def given_up() -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(hostile.host.step(key, Reply("")), 0.1)

    hostile.wait(given_up())
    assert hostile.host.open_episodes == 0
    wait_until_idle(hostile, idle)


def test_what_an_episode_started_outlives_the_end_of_others(hostile: Played) -> None:
    keeper, _ = hostile.begin({"do": "keep a helper"})
    assert says(hostile.step(keeper)) == "helper None"
    for _ in range(10):
        for key in [hostile.begin({"do": "leave a sleeper"})[0] for _ in range(2)]:
            hostile.step(key)
            hostile.close(key)
        assert says(hostile.step(keeper)) == "helper None"
    hostile.close(keeper)


def test_reasons_are_counted(hostile: Played) -> None:
    key, _ = hostile.begin({"do": "exit 7"})
    before = hostile.host.failures().get("step: its process ended: exit status 7", 0)
    hostile.step(key)
    assert hostile.host.failures()["step: its process ended: exit status 7"] == before + 1


def test_all_turns_together_have_a_limit() -> None:
    """Two seconds in all, of which each step takes under one."""
    with playing(
        "hostile_environments:Slow", {"seconds": 0.7}, step_timeout_s=1.0, episode_timeout_s=2.0
    ) as slow:
        key, _ = slow.begin()
        answers = [slow.step(key) for _ in range(3)]
    assert [type(answer) for answer in answers] == [Observation, Observation, EnvironmentFailure]
    check_failure(answers[-1], "timeout", "the episode took more than 2 s in all")


@pytest.mark.parametrize(
    ("gib", "action", "reason"),
    [
        (1.0, "hold memory", "MemoryError"),
        (1.0, "share memory", "it had more than 1 GiB of memory (environment.memory_gib)"),
        (4.0, "hold memory", ""),
        (4.0, "share memory", ""),
    ],
)
def test_memory_has_a_limit_for_one_process_and_for_all(
    gib: float, action: str, reason: str
) -> None:
    with playing("hostile_environments:Hostile", memory_gib=gib, step_timeout_s=20.0) as played:
        bystander, _ = played.begin()
        hungry, _ = played.begin({"do": action})
        answer = played.step(hungry)
        if reason:
            check_failure(answer, "error", reason)
        else:
            assert says(answer) in ("held 1610612736", "shared")
        assert says(played.step(bystander, "hello")) == "you said hello"


@pytest.mark.parametrize(("action", "kind"), [("kill its parent", "error"), ("exit 7", "error")])
def test_a_worker_that_dies_takes_its_own_episodes_and_is_replaced(action: str, kind: str) -> None:
    with playing("hostile_environments:Hostile", workers=2, step_timeout_s=2.0) as played:
        before = played.host.pids
        bad, _ = played.begin({"do": action})
        same = {key: played.begin()[0] for key in range(3)}
        check_failure(played.step(bad), kind, "its process ended")
        played.rest(0.3)
        alive = [isinstance(played.step(key, "x"), Observation) for key in same.values()]
        assert sum(alive) == (3 if action == "exit 7" else 2)
        assert says(played.begin()[1]) == "begun"
        assert len(set(played.host.pids) & set(before)) == (2 if action == "exit 7" else 1)
        assert len(played.host.pids) == 2


def test_a_worker_that_is_stopped_is_replaced() -> None:
    with playing("hostile_environments:Hostile", step_timeout_s=1.0) as played:
        before = played.host.pids
        bad, _ = played.begin({"do": "stop its parent"})
        played.step(bad)
        assert says(played.begin()[1]) == "begun"
        assert played.host.pids != before


def test_nothing_is_left_of_a_host_that_was_killed(tmp_path: Path) -> None:
    script = tmp_path / "host.py"
    script.write_text(
        "import os, time\n"
        "from environment_hosts import playing\n"
        "with playing('hostile_environments:Hostile') as played:\n"
        "    key, _ = played.begin({'do': 'leave a sleeper'})\n"
        "    played.step(key)\n"
        "    print(*played.host.pids, flush=True)\n"
        "    time.sleep(100)\n"
    )
    paths = os.pathsep.join(filter(None, sys.path))  # what pytest has put there
    host = subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": paths},
    )
    assert host.stdout is not None
    worker = int(host.stdout.readline())
    children = [worker, *descendants(worker)]
    assert len(children) >= 3
    host.send_signal(signal.SIGKILL)
    host.wait()
    deadline = time.monotonic() + 10
    while any(map(alive, children)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [pid for pid in children if alive(pid)]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize(
    ("name", "args", "reason"),
    [
        ("hostile_environments:Missing", {}, "has no attribute 'Missing'"),
        ("no_such_module:Class", {}, "No module named 'no_such_module'"),
        ("calculater", {}, "did you mean calculator"),
        ("hostile_environments:COUNTED", {}, "neither a function nor a class"),
        ("hostile_environments:NoStep", {}, "has no method step"),
        ("hostile_environments:WrongStep", {}, "its step does not take"),
        ("hostile_environments:WrongReset", {}, "its reset does not take"),
        ("hostile_environments:NotMade", {}, "RuntimeError: no licence found"),
        ("hostile_environments:Hostile", {"speed": 3}, "does not take"),
        ("hostile_environments:Untyped", {}, "tool Untyped.add"),
        ("hostile_environments:Undocumented", {}, "tool Undocumented.add"),
        ("hostile_environments:HalfDocumented", {}, "tool HalfDocumented.add"),
        ("hostile_environments:Greedy", {}, "name its parameters"),
    ],
)
def test_an_environment_that_cannot_be_used_is_refused_at_the_start(
    name: str, args: dict[str, object], reason: str
) -> None:
    with pytest.raises(UserError) as refused, playing(name, args):
        pass
    assert reason in str(refused.value)
