"""The learner's loop: what it calls, in which order, and what it numbers."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest
from test_budget import receipt

from common.errors import RunError
from deploy.run import until_learner_ends
from learner.loop import LearnerLoop, Schedule

SCHEDULE = Schedule(
    first_step=0,
    last_step=4,
    eval_every=2,
    checkpoint_every=3,
    max_staleness=1,
    take_timeout_s=1.0,
)


class Recorder:
    """Stands for every part of the loop and writes down what it was asked."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.records: dict[int, dict[str, float]] = {}

    async def take(self, version: int, deadline_s: float) -> list[Any]:
        self.calls.append(f"take {version}")
        return [receipt(0, version, version)]

    def observe(self, step: int, metrics: dict[str, float]) -> dict[str, float]:
        assert "loss/policy" in metrics
        return {"guidance/length": float(step)}

    async def release(self) -> None:
        self.calls.append("release")

    async def step(self, receipts: list[Any], version: int, staleness: int) -> dict[str, float]:
        self.calls.append(f"step {version}")
        return {"loss/policy": 0.5}

    async def publish(self, version: int) -> dict[str, float]:
        self.calls.append(f"publish {version}")
        return {"time/publish": 0.1}

    async def prove(self, version: int) -> float:
        self.calls.append(f"prove {version}")
        return 0.0

    async def run(self, step: int) -> dict[str, float]:
        self.calls.append(f"eval {step}")
        return {"eval/accuracy": 0.5}

    async def save(self, step: int) -> None:
        self.calls.append(f"save {step}")

    def record(self, step: int, metrics: dict[str, float]) -> None:
        assert step not in self.records
        self.records[step] = metrics


def run(schedule: Schedule) -> Recorder:
    parts: Any = Recorder()
    loop = LearnerLoop(
        learner=parts,
        publisher=parts,
        groups=parts,
        evaluation=parts,
        save=parts.save,
        record=parts.record,
        schedule=schedule,
    )
    asyncio.run(loop.run())
    return parts


def test_a_step_takes_trains_publishes_and_only_then_releases() -> None:
    calls = run(replace(SCHEDULE, last_step=1, eval_every=0, checkpoint_every=0)).calls
    assert calls == [
        *("prove 0", "eval 0", "take 0", "step 0", "publish 1", "release", "eval 1", "save 1")
    ]


def test_evaluations_and_checkpoints_fall_on_their_steps_and_on_the_last() -> None:
    parts = run(SCHEDULE)
    assert [call for call in parts.calls if call.startswith("eval")] == [
        "eval 0",
        "eval 2",
        "eval 4",
    ]
    assert [call for call in parts.calls if call.startswith("save")] == ["save 3", "save 4"]
    assert sorted(parts.records) == [0, 1, 2, 3, 4]
    assert parts.records[4]["policy_version"] == 4


def test_a_resumed_run_does_not_evaluate_or_train_its_past_again() -> None:
    parts = run(replace(SCHEDULE, first_step=3))
    assert parts.calls[0] == "take 3"
    assert sorted(parts.records) == [4]


def test_any_other_loop_that_returns_is_an_error() -> None:
    async def ends() -> None:
        return None

    async def fails() -> None:
        raise ValueError("cause")

    async def learns() -> dict[str, float]:
        await asyncio.sleep(5)
        return {}

    with pytest.raises(RunError, match="never should"):
        asyncio.run(until_learner_ends(learns(), ends()))
    with pytest.raises(ValueError, match="cause"):
        asyncio.run(until_learner_ends(learns(), fails()))
