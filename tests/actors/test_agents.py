"""Commands that play episodes: real processes behind real walls, and a policy that is a script."""

from __future__ import annotations

import asyncio
import json
import math
import os
import socket
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import odd_agents
import psutil
import pytest
from chat_templates import FAMILIES

from actors.endpoint import command as command_module
from actors.endpoint.agents import Agents
from actors.endpoint.command import Command
from actors.environments.check import environment_tools, inspect_environment
from actors.generation.engine import Completion
from actors.generation.episodes import Episode
from actors.generation.rows import rollout_batch
from actors.rendering.renderer import Renderer
from actors.sandbox import walls as walls_module
from common.config.environment import EnvironmentConfig
from common.config.sections import DataConfig
from common.errors import UserError
from common.record.episodes import episode_metrics, episode_sums
from common.record.segments import check_segments
from common.record.turns import check_turns, sampled_lengths
from common.trajectory import GroupRequest

TOKENIZER = FAMILIES["hermes"].tokenizer()
SCRIPT = odd_agents.__file__
MARK = f"of-{os.getpid()}"
"""Of the agents of these tests, and of none that another process tests at the same time."""
END = "<|im_end|>"


@pytest.fixture(scope="module", autouse=True)
def _vllm_is_imported() -> None:
    """Its parsers take longer to import than an agent of these tests has."""
    renderer(())


def renderer(tools: Sequence[Mapping[str, Any]]) -> Renderer:
    return Renderer.start(TOKENIZER, DataConfig(), tools=tools)


class Policy:
    """Says the next of its lines, or the last one again; keeps what it was asked."""

    def __init__(self, *lines: str, takes_s: float = 0.0) -> None:
        self.lines = list(lines) or ["four"]
        self.takes_s = takes_s
        self.asked: list[tuple[list[int], dict[str, Any]]] = []

    async def __call__(
        self, request_id: str, token_ids: list[int], sampling: dict[str, Any]
    ) -> Completion:
        self.asked.append((list(token_ids), dict(sampling)))
        await asyncio.sleep(self.takes_s)
        line = self.lines.pop(0) if len(self.lines) > 1 else self.lines[0]
        ids = [t for letter in line for t in encoded(letter)] + encoded(END)
        cut = ids[: sampling["max_tokens"]]
        finish = "stop" if cut == ids else "length"
        return Completion(cut, [-0.5] * len(cut), [len(self.asked)] * len(cut), finish)


def encoded(text: str) -> list[int]:
    return list(TOKENIZER(text, add_special_tokens=False)["input_ids"])


def asked(**changes: Any) -> GroupRequest:
    task = {"prompt": "2 + 2?", "answer": "four", **changes.pop("task", {})}
    made = GroupRequest(
        group_id=5,
        ticket=5,
        prompt_id="p",
        epoch=0,
        question="2 + 2?",
        prompt_text="",
        prompt_ids=encoded("2 + 2?"),
        reference=json.dumps(task),
        num_completions=1,
        max_tokens=2000,
        temperature=1.0,
        dispatch_version=3,
        dispatched_s=0.0,
        seed=7,
    )
    return replace(made, **changes)


def config(what: str, **settings: Any) -> EnvironmentConfig:
    command = ["python", SCRIPT, what, MARK]
    return EnvironmentConfig(command=command, **({"episode_timeout_s": 60.0} | settings))


def play(
    what: str, policy: Policy | None = None, request: GroupRequest | None = None, **settings: Any
) -> Episode:
    """One episode, which is checked as the log checks it. Nothing of it is left running."""
    request = request or asked()

    async def run() -> Episode:
        agents = Agents(config(what, **settings), renderer, policy or Policy(), 4000)
        try:
            async with asyncio.timeout(100):
                return await agents.play(request, 0, {"temperature": 1.0}, True)
        finally:
            await agents.shutdown()

    episode = asyncio.run(run())
    batch = rollout_batch(request, {0: episode}, [episode.text], "g")
    check_turns(batch)
    check_segments(batch)
    assert not left_running()
    return episode


def left_running() -> list[str]:
    """Agents of this process, wherever they belong now, and who keeps one."""
    everybody = psutil.process_iter(["cmdline"])
    lines = [" ".join(process.info["cmdline"] or ()) for process in everybody]
    below = psutil.Process().children(recursive=True)
    keepers = [line for each in below if "actors.endpoint.keeper" in (line := command_of(each))]
    return [line for line in lines if line.endswith(MARK)] + keepers


def command_of(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


def sampled_ids(episode: Episode) -> list[int]:
    return [
        t for t, p in zip(episode.token_ids, episode.logprobs, strict=True) if not math.isnan(p)
    ]


def test_an_agent_plays_an_episode_with_base_url_and_key_alone() -> None:
    policy = Policy("five", "four")
    episode = play("answers", policy)
    assert (episode.environment_verdict, episode.environment_reward) == ("pass", 1.0)
    assert (episode.finish_reason, episode.text) == ("stop", "four")
    (segment,) = episode.segments
    assert TOKENIZER.decode(segment["prompt_ids"]).endswith(
        "2 + 2?<|im_end|>\n<|im_start|>assistant\n"
    )
    said = [t for word in ("five", "four") for t in (*map_letters(word), *encoded(END))]
    assert sampled_ids(episode) == said
    for turn, (ids, _) in zip(episode.turns, policy.asked, strict=True):
        assert ids == segment["prompt_ids"] + episode.token_ids[: turn["begin"]]
    assert 0 < episode.environment_s < 60


def map_letters(word: str) -> list[int]:
    return [t for letter in word for t in encoded(letter)]


def test_the_reward_is_what_the_last_line_says() -> None:
    assert play("answers", Policy("five")).environment_reward == 0.25
    episode = play("leaves it to the rules", Policy("it is four"))
    assert (episode.environment_verdict, episode.environment_reward) == ("", None)
    assert episode.text == "it is four"


def test_conversations_are_segments_of_one_episode() -> None:
    episode = play("forks", Policy("one", "two", "three", "four"))
    texts = [TOKENIZER.decode(segment["prompt_ids"]) for segment in episode.segments]
    assert ["A sub-task" in text for text in texts] == [False, True, False]
    assert "summary" in texts[2]
    spans = [(segment["begin"], segment["end"]) for segment in episode.segments]
    turns = [sum(b <= turn["begin"] < e for turn in episode.turns) for b, e in spans]
    assert turns == [2, 1, 1]  # the first one goes on behind the second
    request = asked()
    rows = rollout_batch(request, {0: episode}, [episode.text], "g")
    assert sampled_lengths(rows).tolist() == [len(sampled_ids(episode))]
    assert episode_metrics([episode_sums(rows)])["episode/segments"] == 3.0


def test_a_conversation_that_the_prompt_begins_needs_no_segment() -> None:
    prompt = play("answers").segments[0]["prompt_ids"]
    assert play("answers", request=asked(prompt_ids=prompt)).segments == ()


def test_turns_have_seeds_by_what_stands_before_them() -> None:
    seeds = []
    for seed in (7, 7, 8):
        policy = Policy("one", "two", "three")
        play("forks", policy, asked(seed=seed))
        seeds.append([sampling["seed"] for _, sampling in policy.asked])
    assert seeds[0] == seeds[1]
    assert len({*seeds[0], *seeds[2]}) == 8


FAILURES = [
    ("raises", "error", "RuntimeError: the agent lost its way"),
    ("exits", "error", "exit status 3"),
    ("kills itself", "error", "signal SIGKILL"),
    ("gives NaN", "error", "not a finite number"),
    ("gives words", "error", "not a number"),
    ("says nothing", "error", "without a turn of the policy"),
    ("prints a gigabyte of errors", "error", "at last"),
    ("forks on", "error", "more than 64 processes"),
    ("takes memory", "error", "GiB of memory"),
]


@pytest.mark.parametrize(("what", "verdict", "reason"), FAILURES)
def test_a_command_that_fails_is_no_reward(what: str, verdict: str, reason: str) -> None:
    episode = play(what, memory_gib=1.0)
    assert (episode.environment_verdict, episode.environment_reward) == (verdict, None)
    assert reason in episode.environment_reason
    assert len(episode.turns) == 1 and bool(episode.token_ids) == (what != "says nothing")


def test_a_command_has_one_deadline() -> None:
    began = time.monotonic()
    episode = play("hangs", episode_timeout_s=15.0)
    assert (episode.environment_verdict, episode.environment_reward) == ("timeout", None)
    assert "more than 15 s of its own" in episode.environment_reason
    assert sampled_ids(episode) and time.monotonic() - began < 60


def test_the_time_that_the_policy_takes_is_not_the_commands() -> None:
    episode = play("answers", Policy("four", takes_s=8.0), episode_timeout_s=15.0)
    assert episode.environment_reward == 1.0
    assert episode.environment_s < 15


def test_a_gigabyte_of_words_is_read_and_not_kept() -> None:
    before = psutil.Process().memory_info().rss
    assert play("prints a gigabyte").environment_reward == 1.0
    assert psutil.Process().memory_info().rss - before < 300 * 2**20


def test_what_it_leaves_behind_is_ended() -> None:
    assert play("leaves a child").environment_reward == 1.0  # `play` looks for what is left


def test_it_cannot_reach_its_keeper() -> None:
    episode = play("kills its keeper")
    assert episode.environment_reward is None
    assert "PermissionError" in episode.environment_reason


@pytest.mark.parametrize("less", ["", "user", "bubblewrap", "bubblewrap,user"])
def test_it_reaches_the_endpoint_and_nothing_else(
    less: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No port of this host, no other host, no socket of the file system, no file, no secret; behind
    the best walls of this host, and where it pretends to lack some."""
    walls = walls_module.find_walls(frozenset(less.split(",")) - {""})
    monkeypatch.setattr(command_module, "find_walls", lambda: walls)
    monkeypatch.setenv("A_SECRET", "x")
    secret, path = tmp_path / "secret", str(tmp_path / "socket")
    secret.write_text("the answers")
    with (
        socket.create_server(("127.0.0.1", 0)) as outside,
        socket.socket(socket.AF_UNIX) as files,
        socket.socket(socket.AF_UNIX) as abstract,
    ):
        files.bind(path)
        abstract.bind("\0" + path)
        for listener in (files, abstract):
            listener.listen()
        task = {"port": outside.getsockname()[1], "path": path, "secret": str(secret)}
        here = {name: odd_agents_reach(name, task) for name in ("outside", "files", "abstract")}
        assert all(here.values())  # so the test can fail
        assert play("looks around", request=asked(task=task)).environment_reward == 1.0
        open_one = play("looks around", request=asked(task=task), network=True)
        assert open_one.environment_reward == 0.0


def odd_agents_reach(name: str, task: dict[str, Any]) -> bool:
    family = socket.AF_INET if name == "outside" else socket.AF_UNIX
    addresses: dict[str, Any] = {
        "outside": ("127.0.0.1", task["port"]),
        "files": task["path"],
        "abstract": "\0" + task["path"],
    }
    with socket.socket(family, socket.SOCK_STREAM) as one:
        return one.connect_ex(addresses[name]) == 0


def test_another_key_is_refused_at_its_address() -> None:
    assert play("uses another key").environment_reward == 1.0


def test_two_processes_with_one_key_are_two_conversations_or_refused() -> None:
    policy = Policy("four", takes_s=1.0)
    both = play("asks twice at once", policy)
    assert both.environment_reward == 2.0
    assert [len(segment["prompt_ids"]) > 0 for segment in both.segments] == [True] * 3
    refused = play("asks twice at once", policy, forks="error")
    assert refused.environment_reward == 0.0 and len(refused.segments) == 1


@pytest.mark.parametrize(
    ("limits", "end"),
    [
        ({"max_turns": 3}, "turns"),
        ({"max_tokens": 40}, "length"),
        ({"longest": 120}, "context"),
    ],
)
def test_a_limit_ends_an_episode_and_is_no_failure(
    limits: dict[str, int], end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = asked(max_tokens=limits.pop("max_tokens", 2000))
    longest = limits.pop("longest", 4000)
    policy = Policy("four")

    async def run() -> Episode:
        settings = {"max_turns": 1000} | limits
        agents = Agents(config("goes on and on", **settings), renderer, policy, longest)
        async with asyncio.timeout(60):
            return await agents.play(request, 0, {"temperature": 1.0}, True)

    episode = asyncio.run(run())
    assert episode.finish_reason == end
    assert (episode.environment_verdict, episode.environment_reward) == ("", None)
    assert len(episode.token_ids) <= request.max_tokens
    assert all(len(ids) < longest for ids, _ in policy.asked)
    if end == "turns":
        assert len(episode.turns) == 3


def test_episodes_beside_each_other_keep_apart() -> None:
    """Each has an address of its own, and none of them can be reached from here."""

    async def run() -> list[Episode]:
        agents = Agents(config("answers"), renderer, Policy("four"), 4000)
        plays = [agents.play(asked(), index, {"temperature": 1.0}, True) for index in range(6)]
        return await asyncio.gather(*plays)

    episodes = asyncio.run(run())
    assert [episode.environment_reward for episode in episodes] == [1.0] * 6
    assert len({len(episode.token_ids) for episode in episodes}) == 1


def test_an_episode_that_is_given_up_leaves_nothing() -> None:
    async def run() -> None:
        policy = Policy("four")
        agents = Agents(config("hangs"), renderer, policy, 4000)
        task = asyncio.ensure_future(agents.play(asked(), 0, {"temperature": 1.0}, True))
        async with asyncio.timeout(60):
            while not policy.asked:
                await asyncio.sleep(0.05)
        assert left_running()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())
    assert not left_running() and threading.active_count() < 50


@pytest.mark.parametrize("after_s", [0.0, 0.3, 1.0])
def test_an_episode_that_is_given_up_as_it_begins_leaves_nothing(after_s: float) -> None:
    """Before there is a process, while one starts, and soon after."""

    async def run() -> None:
        agents = Agents(config("hangs"), renderer, Policy("four"), 4000)
        task = asyncio.ensure_future(agents.play(asked(), 0, {"temperature": 1.0}, True))
        await asyncio.sleep(after_s)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())
    assert not left_running()


def test_a_command_that_is_not_there_is_said_before_a_run() -> None:
    missing = EnvironmentConfig(command=["no-such-agent"])
    with pytest.raises(UserError, match="no program 'no-such-agent' on PATH"):
        inspect_environment(missing, {})
    assert environment_tools(missing) == []
    (note,) = inspect_environment(config("answers"), {}).notes
    assert note.endswith(f"{SCRIPT} answers {MARK}") and note.startswith("command: /")


NO_NAMESPACES = """
from actors.sandbox import confinement as c
from actors.sandbox.network import _UNSHARE
import platform
refuse = [(c._EQUAL, 0, 1, _UNSHARE[platform.machine()]), (c._RETURN, 0, 0, c._ERROR | 1)]
c._install([*c._head(), *refuse, (c._RETURN, 0, 0, c._ALLOW)], "", 0)
"""


def test_a_host_without_networks_of_ones_own_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a container forbids it: the refusal says what to do, and network=true does it."""
    (tmp_path / "sitecustomize.py").write_text(NO_NAMESPACES)
    walls = replace(command_module.find_walls(), bubblewrap=None)
    monkeypatch.setattr(command_module, "find_walls", lambda: walls)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(walls_module, "_OF_RULES", (*walls_module._OF_RULES, str(tmp_path)))
    with pytest.raises(UserError, match=r"a network of its own here.*environment\.network=true"):
        inspect_environment(config("answers"), {})
    assert play("answers", network=True).environment_reward == 1.0


def test_files_that_a_command_names_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here, or where modules are looked for; a link to an interpreter stays one."""
    script, interpreter = tmp_path / "agent.py", tmp_path / "own" / "bin" / "python"
    script.write_text("")
    interpreter.parent.mkdir(parents=True)
    interpreter.symlink_to(sys.executable)
    monkeypatch.syspath_prepend(str(tmp_path))
    found = Command(EnvironmentConfig(command=["own/bin/python", "agent.py", "--flag"]))
    assert found.words == [str(interpreter), str(script), "--flag"]
    assert Command(EnvironmentConfig(command=["python"])).words == [sys.executable]
