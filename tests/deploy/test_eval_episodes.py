"""What an evaluation says of episodes: lengths, turns, limits and ends, from a log made by hand."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from actors.generation.episodes import Episode
from actors.generation.rows import rollout_batch
from actors.verifiers.judge import Played, judgement
from actors.verifiers.worker import with_verdicts
from common.config.sections import VerifierSpec
from common.record.schema import trajectory_schema
from common.record.trajectory_log import TrajectoryLog
from common.record.turns import turn
from common.trajectory import GroupRequest
from deploy.eval import launch, report
from deploy.eval.settings import Options, Sampling, evaluation_config
from deploy.eval.suite import load_suite
from deploy.run.directory import RunDirectory

GRADER = VerifierSpec(name="environment")
ENDS = [("stop", 1.0), ("turns", 0.0), ("context", 0.0), ("length", 0.0)]
TURNS = [(3, 2), (1, 1, 1), (4,), (2, 2)]
"""Sampled tokens of each turn; five tokens are given between two."""


def episode(lengths: tuple[int, ...], finish: str, reward: float | None) -> Episode:
    ids: list[int] = []
    logprobs: list[float] = []
    turns = []
    for length in lengths:
        if turns:
            ids += [9] * 5
            logprobs += [math.nan] * 5
        turns.append(turn(len(ids), len(ids) + length, "stop"))
        ids += [1] * length
        logprobs += [-0.5] * length
    verdict = "error" if reward is None else "pass" if reward > 0 else "fail"
    return Episode(
        ids,
        logprobs,
        [0] * len(ids),
        finish,
        turns=tuple(turns),
        text="last words",
        environment_verdict=verdict,
        environment_reason="it broke" if reward is None else "",
        environment_reward=reward,
        environment_s=0.5,
    )


def logged(folder: Path, episodes: list[Episode]) -> None:
    log = TrajectoryLog(folder, trajectory_schema(["environment"]))
    for number, played in enumerate(episodes):
        request = GroupRequest(
            group_id=number,
            ticket=-1,
            prompt_id=f"p{number}",
            epoch=-1,
            question="?",
            prompt_text="?",
            prompt_ids=[1],
            reference=json.dumps({"prompt": "?", "answer": "4"}),
            num_completions=1,
            max_tokens=96,
            temperature=0.0,
            dispatch_version=0,
            dispatched_s=0.0,
        )
        batch = rollout_batch(request, {0: played}, [played.text], "generator-0")
        said = Played(
            played.environment_verdict, played.environment_reason, played.environment_reward
        )
        judged = judgement([said.as_verdict()], [1.0])
        log.append(with_verdicts(batch, ["environment"], [judged]))
    log.close()


def results(folder: Path, episodes: list[Episode]) -> dict[str, object]:
    logged(folder, episodes)
    samples = report.collect(folder, len(episodes), 1, GRADER)
    settings = {
        "suite": {"name": "mine"},
        "model": "m",
        "problems": len(episodes),
        "sampling": {"samples": 1, "seed": 5},
    }
    return report.results_of(samples, settings, {})


def test_given_tokens_are_no_length_and_every_limit_truncates(tmp_path: Path) -> None:
    played = [episode(n, *end) for n, end in zip(TURNS, ENDS, strict=True)]
    found = results(tmp_path, played)
    metrics = found["metrics"]
    assert isinstance(metrics, dict)
    assert list(metrics) == ["avg@1", "length", "turns", "truncated"]
    values = {name: estimate["value"] for name, estimate in metrics.items()}
    assert values["length"] == pytest.approx((5 + 3 + 4 + 4) / 4)
    assert values["turns"] == pytest.approx((2 + 3 + 1 + 2) / 4)
    assert values["truncated"] == pytest.approx(3 / 4)
    assert values["avg@1"] == pytest.approx(1 / 4)
    episodes = found["episodes"]
    assert isinstance(episodes, dict)
    assert episodes["episode/given_tokens"] == pytest.approx((5 + 10 + 0 + 5) / 4)
    assert episodes["episode/environment_s"] == pytest.approx(0.5)
    table = report.table(found)
    assert "ended by stop 1, length 1, turns 1, context 1" in table
    assert "turns         2.0" in table


def test_a_failure_of_the_environment_counts_as_wrong_and_is_named(tmp_path: Path) -> None:
    found = results(tmp_path, [episode((2,), "stop", 1.0), episode((2,), "stop", None)])
    assert found["verdicts"] == {"pass": 1, "error": 1}
    assert "error 1" in report.table(found)
    rows = report.collect(tmp_path, 2, 1, GRADER).completions.to_pylist()
    assert [row["reason"] for row in rows] == ["", "it broke"]


def test_suites_of_another_environment_have_generators_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    together: list[list[str]] = []

    async def sample(jobs: list[launch.Job], folder: Path, notify: object) -> None:
        together.append([job.name for job in jobs])

    monkeypatch.setattr(launch, "_sample", sample)
    jobs = []
    for name in ("algebra", "calculator", "logic"):
        suite = load_suite(name)
        config = evaluation_config(Options(model="m", suites=[name]), suite)
        run = RunDirectory.make(tmp_path / name, "")
        jobs.append(launch.Job(suite.name, Sampling(1, 0.0, 9, 0), [], config, {}, run, [0]))
    launch.sample_all(jobs, print)
    assert together == [["algebra", "logic"], ["calculator"]]
    other = replace(jobs[1].config.environment, max_turns=7)
    jobs[2] = replace(jobs[2], config=replace(jobs[2].config, environment=other))
    together.clear()
    launch.sample_all(jobs, print)
    assert together == [["algebra"], ["calculator"], ["logic"]]
    for job in jobs:
        job.run.release()
