"""Runs whose log has episodes of a real environment, without a model: turns are given as texts."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from run_process import EPISODES
from source_tree import ROOT

from actors.environments.host import EnvironmentHost
from actors.generation.engine import Completion
from actors.generation.episodes import Player
from actors.generation.rows import rollout_batch
from actors.rendering.renderer import Renderer
from actors.verifiers.judge import Judge, Played
from actors.verifiers.worker import with_verdicts
from common.config.load import dump_config
from common.config.sections import Config
from common.record.trajectory_log import TrajectoryLog
from common.trajectory import GroupRequest, group_seed
from deploy.command.presets import load
from deploy.models.resolve import tokenizer_here

GROUP = 7


def configured(name: str | None, *overrides: str) -> Config:
    keys = [*EPISODES, f"environment.name={name}", "environment.max_turns=3", *overrides]
    keys += ["generator.max_completion_tokens=240", "model.max_length=300"]
    return load(ROOT / "deploy/configs/tiny.yaml", keys)


def made(
    run: Path, config: Config, episodes: Sequence[Sequence[str]], task: dict[str, Any] | None = None
) -> Path:
    """A run whose log has a group of `episodes`; each is what the policy says, turn after turn."""
    run.mkdir(exist_ok=True)
    (run / "config.yaml").write_text(dump_config(config))
    tokenizer = tokenizer_here(config.model.path)
    request = GroupRequest(
        GROUP, GROUP, "p-0", 0, "?", "?", tokenizer.encode("user: ?"),
        json.dumps({"prompt": "?", "answer": "", **(task or {})}), len(episodes),
        config.generator.max_completion_tokens, 1.0, 0, 0.0,
        seed=group_seed(config.sampling_seed, GROUP),
    )  # fmt: skip
    batch = asyncio.run(_played(config, request, tokenizer, episodes))
    log = TrajectoryLog(run / "trajectories", batch.schema)
    log.append(batch)
    log.close()
    return run


async def _played(
    config: Config, request: GroupRequest, tokenizer: Any, episodes: Sequence[Sequence[str]]
) -> pa.RecordBatch:
    host = EnvironmentHost(config.environment)
    await host.start()
    renderer = Renderer.of_environment(tokenizer, config.data, config.environment, host.tools)
    found = {}
    for index, texts in enumerate(episodes):
        left = list(texts)

        async def says(key: str, ids: list[int], sampling: Any, left: list[str] = left):
            said = [*tokenizer.encode(left.pop(0)), tokenizer.eos_token_id]
            return Completion(said, [-0.5] * len(said), [0] * len(said), "stop")

        length = config.model.max_length
        player = Player(config.environment, host, renderer, tokenizer, says, length)
        found[index] = await player.play(request, index, {}, False)
    await host.shutdown()
    batch = rollout_batch(request, found, [each.text for each in found.values()], "g")
    played = [
        Played(each.environment_verdict, each.environment_reason, each.environment_reward)
        for each in found.values()
    ]
    nobody = ["{}"] * len(found)
    return with_verdicts(
        batch,
        ["environment"],
        Judge(config.verifier).judge([""] * len(found), nobody, played=played),
    )
