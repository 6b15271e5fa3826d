"""Episodes of a log played again by their commands: real processes, and the log in the policy's
place."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import odd_agents
import pytest
from run_process import EPISODES
from source_tree import ROOT

from actors.endpoint.agents import Agents
from actors.generation.engine import Completion
from actors.generation.generator import rollout_batch
from actors.rendering.renderer import Renderer
from actors.verifiers.judge import Judge, Played
from actors.verifiers.worker import with_verdicts
from common.config.load import dump_config
from common.config.sections import Config
from common.record.trajectory_log import TrajectoryLog
from common.trajectory import GroupRequest
from deploy.cli import main
from deploy.command.presets import load
from deploy.models.resolve import tokenizer_here

GROUP, WORDS = 7, ("four", "five5", "six", "7")


def configured(what: str) -> Config:
    command = f"environment.command=[python, {odd_agents.__file__}, {what}]"
    keys = [*EPISODES, "environment.name=null", command, "environment.episode_timeout_s=100"]
    keys += ["environment.max_turns=8"]
    keys += ["generator.max_completion_tokens=400", "model.max_length=480"]
    return load(ROOT / "deploy/configs/tiny.yaml", keys)


def made(run: Path, what: str, said: Sequence[str] = WORDS) -> Path:
    """A run whose log has one episode of a command, in which the policy says these words."""
    run.mkdir()
    config = configured(what)
    (run / "config.yaml").write_text(dump_config(config))
    tokenizer = tokenizer_here(config.model.path)
    request = GroupRequest(
        GROUP, GROUP, "p-0", 0, "?", "?", tokenizer.encode("user: ?"),
        json.dumps({"prompt": "?", "answer": "five5"}), 1, 400, 1.0, 0, 0.0,
    )  # fmt: skip
    left = list(said)

    async def says(key: str, ids: list[int], sampling: Any) -> Completion:
        spoken = [*tokenizer.encode(left.pop(0)), tokenizer.eos_token_id]
        return Completion(spoken, [-0.5] * len(spoken), [0] * len(spoken), "stop")

    async def played() -> Any:
        def start_renderer(tools: Any) -> Renderer:
            return Renderer.start(tokenizer, config.data, tools=tools)

        agents = Agents(config.environment, start_renderer, says, config.model.max_length)
        return await agents.play(request, 0, {}, False)

    each = asyncio.run(played())
    batch = rollout_batch(request, {0: each}, [each.text], "g")
    judged = Played(each.environment_verdict, each.environment_reason, each.environment_reward)
    verdicts = Judge(config.verifier).judge([""], ["{}"], played=[judged])
    batch = with_verdicts(batch, ["environment"], verdicts)
    log = TrajectoryLog(run / "trajectories", batch.schema)
    log.append(batch)
    log.close()
    return run


def replayed(run: Path, capsys: pytest.CaptureFixture[str], *more: str) -> tuple[int, str]:
    capsys.readouterr()
    status = main(["replay", str(run), "--episode", f"{GROUP}/0", *more])
    found = capsys.readouterr()
    return status, found.out + found.err


@pytest.mark.parametrize(
    ("what", "turns"),
    [("answers", 2), ("forks", 4), ("asks twice at once", 3), ("raises", 1), ("says nothing", 0)],
)
def test_a_command_that_repeats_itself_is_the_same(
    tmp_path: Path, what: str, turns: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """With conversations beside each other, the same call made twice at once, and failures."""
    words = [*WORDS, *["no"] * 8]
    status, output = replayed(made(tmp_path / "run", what, words), capsys, "--trust-code")
    assert status == 0, output
    assert f"{what}, {turns} turn{'' if turns == 1 else 's'}, played again" in output
    assert "all calls and rewards are the same" in output


@pytest.mark.parametrize(
    ("now", "where", "what", "shown"),
    [
        ("forks", "behind turn 1: the call", "Sure?", "'A sub-task: ?"),
        (
            "leaves it to the rules",
            "behind turn 1: the call",
            "'user: ?",
            "no more calls: it ended",
        ),
        ("plays", "behind turn 2: the reward", "1.0", "0."),
        ("hangs", "behind turn 1: the call", "", "it ended by stop, timeout"),
    ],
)
def test_the_first_difference_is_named(
    tmp_path: Path, now: str, where: str, what: str, shown: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Another script under the same name."""
    run = made(tmp_path / "run", "answers")
    text = (run / "config.yaml").read_text()
    text = text.replace("- answers", f"- {now}")
    if now == "hangs":
        text = text.replace("episode_timeout_s: 100.0", "episode_timeout_s: 5.0")
    (run / "config.yaml").write_text(text)
    status, output = replayed(run, capsys, "--trust-code")
    assert status == 1, output
    assert f"it differs from the log {where}" in output, output
    recorded, again = output.splitlines()[2:4]
    assert what in recorded and shown in again, output
    assert "the command has changed since, or does not repeat itself for a task" in output


def test_a_command_runs_only_where_it_is_trusted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, output = replayed(made(tmp_path / "run", "answers"), capsys)
    assert (status, "environment.command" in output, "--trust-code" in output) == (2, True, True)
