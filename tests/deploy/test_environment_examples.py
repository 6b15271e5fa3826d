"""The examples of environments, played as a run plays them: in processes behind walls."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from environment_hosts import playing
from source_tree import ROOT

from actors.environments.host import Observation
from actors.verifiers.reasoning_gym import encode_entry, import_reasoning_gym

FOLDER = ROOT / "deploy" / "examples" / "environments"
SERVER = ROOT / "tests" / "support" / "openenv_server.py"
OPENENV_PYTHON = os.environ.get("OPENENV_PYTHON", "")


def needs(package: str) -> pytest.MarkDecorator:
    missing = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(missing, reason=f"{package} is not installed: pip install {package}")


def example(name: str) -> str:
    return f"deploy.examples.environments.{name}"


def seen(answer: object) -> Observation:
    assert isinstance(answer, Observation), answer
    return answer


@pytest.mark.parametrize("path", sorted(FOLDER.glob("[a-z]*.py")), ids=lambda path: path.stem)
def test_an_example_is_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 60


def test_the_second_try_at_a_task_is_worth_half() -> None:
    entry = import_reasoning_gym().create_dataset("chain_sum", seed=1, size=1)[0]
    task = {"prompt": entry["question"], "answer": entry["answer"], "task": "chain_sum"}
    task |= {"params": {}, "entry": encode_entry(entry)}
    rewards: list[list[float | None]] = []
    with playing(example("second_try:SecondTry"), step_timeout_s=60.0) as played:
        for replies in ([entry["answer"]], ["-1", entry["answer"]], ["-1", "-2"]):
            key, _ = played.begin(task)
            answers = [seen(played.step(key, reply)) for reply in replies]
            assert [answer.done for answer in answers] == [False] * (len(replies) - 1) + [True]
            rewards.append([answer.reward for answer in answers])
            played.close(key)
    assert rewards == [[1.0], [None, 0.5], [None, 0.0]]


@needs("gymnasium")
def test_a_game_of_gymnasium_is_played_in_words() -> None:
    """The one shortest way through FrozenLake's small map, without its slippery ice."""
    args: dict[str, Any] = {"options": {"is_slippery": False}}
    with playing(example("gymnasium_text:Game"), args, step_timeout_s=60.0) as played:
        key, first = played.begin()
        assert "[S]FFF\nFHFH\nFFFH\nHFFG" in seen(first).text
        assert seen(played.step(key, "I stay")).text == "Say one of left, down, right, up."
        way = ["down", "down", "go right, no: right", "Down!", "right", "right"]
        answers = [seen(played.step(key, word)) for word in way]
        assert [answer.reward for answer in answers] == [0.0] * 5 + [1.0]
        assert [answer.done for answer in answers] == [False] * 5 + [True]
        assert answers[0].state == seen(first).text
        played.close(key)


@needs("textarena")
def test_a_game_of_textarena_is_played_to_its_end() -> None:
    """By halving; the seed is the secret's, and what is observed is what is new."""
    with playing(example("textarena_game:Game"), step_timeout_s=60.0) as played:
        for seed in (1, 2):
            key, first = played.begin(seed=seed)
            assert "Guess The Number" in seen(first).text
            low, high, answer = 1, 20, seen(first)
            for _ in range(5):
                middle = (low + high) // 2
                answer = seen(played.step(key, f"I say [{middle}]"))
                if answer.done:
                    break
                assert "Guess The Number" not in answer.text
                low, high = (middle + 1, high) if "higher" in answer.text else (low, middle - 1)
            assert (answer.done, answer.reward) == (True, 1.0)
            played.close(key)


@pytest.fixture
def openenv() -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen([OPENENV_PYTHON, str(SERVER), str(port)])
    try:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                assert server.poll() is None
                time.sleep(0.2)
        yield f"ws://127.0.0.1:{port}/ws"
    finally:
        server.kill()
        server.wait()


@pytest.mark.skipif(
    not OPENENV_PYTHON, reason="OPENENV_PYTHON names no Python with openenv-core and uvicorn"
)
def test_a_server_of_openenv_is_played_over_its_socket(openenv: str) -> None:
    args = {"url": openenv, "shown": "echoed_message"}
    name = example("openenv_client:OpenEnv")
    with playing(name, args, network=True, step_timeout_s=60.0) as played:
        one, first = played.begin(seed=5)
        other, _ = played.begin(seed=6)
        assert seen(first).text == "seed 5"
        said = [seen(played.step(one, text)) for text in ("hi", "bye")]
        assert [(a.text, a.reward, a.done) for a in said] == [
            ("1 hi", 1.0, False),
            ("2 bye", 2.0, True),
        ]
        assert seen(played.step(other, "me")).text == "1 me"
        played.close(one)
        played.close(other)
    with playing(name, {"url": openenv}, network=True, step_timeout_s=60.0) as played:
        key, first = played.begin(seed=5)
        assert json.loads(seen(first).text)["echoed_message"] == "seed 5"
        played.close(key)
    with playing(name, args, step_timeout_s=60.0) as played:
        _, refused = played.begin()
        assert "PermissionError" in getattr(refused, "reason", "")
