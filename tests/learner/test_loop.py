"""The learner's loop: what it calls, in which order, and what it numbers."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from made_up_groups import receipt

from common.errors import NumbersError, WeightsError
from common.record.metric_names import METRICS, in_table
from common.supervision.loops import first_cause
from common.trajectory import GroupReceipt
from learner.loop import LearnerLoop, Schedule
from learner.weights.canary import CanaryProof
from learner.weights.publish import Exported

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
        self.proved = 0
        self.gap = 0.25
        self._news = asyncio.Event()
        self.deliverable = asyncio.Event()
        self.deliverable.set()
        self.newest_token = 0
        self.kept: list[Any] = []
        self.scores: list[Any] = []
        self.asked_scores: list[tuple[int, float]] = []
        self.broken_at = -1
        self.shares_devices = False

    async def make_room(self) -> None:
        assert self.shares_devices
        self.calls.append("make room")

    async def take(self, version: int, deadline_s: float) -> list[Any]:
        self.calls.append(f"take {version}")
        return [receipt(0, version, self.newest_token)]

    def trained(self, step: int, receipts: list[GroupReceipt]) -> None:
        assert len(receipts) == 1

    def metrics(self) -> dict[str, float]:
        return {"groups/dispatched": 1.0}

    def adapt(self, step: int, metrics: Mapping[str, float]) -> dict[str, float]:
        assert "loss/policy" in metrics
        return {"guidance/length": float(step)}

    async def release(self) -> None:
        self.calls.append("release")

    async def step(
        self, receipts: list[Any], version: int, staleness: int, scores: Any = None
    ) -> dict[str, float]:
        self.calls.append(f"step {version}")
        self.scores.append(scores)
        if version == self.broken_at:
            raise NumbersError("the gradient norm is nan")
        return {"loss/policy": 0.5}

    async def score(self, receipts: list[Any], deadline_s: float) -> list[Any]:
        self.calls.append("score")
        self.asked_scores.append((len(receipts), deadline_s))
        return [f"scores of {receipt.group_id}" for receipt in receipts]

    async def export(self, version: int) -> Exported:
        self.calls.append(f"export {version}")
        return Exported(version, None, 0.1)

    async def deliver(self, exported: Exported) -> dict[str, float]:
        await self.deliverable.wait()
        self.calls.append(f"deliver {exported.version}")
        self.proved = exported.version
        self._news.set()
        return {"time/publish": 0.1}

    until_proved = CanaryProof.until_proved

    async def run(self, step: int) -> dict[str, float]:
        self.calls.append(f"eval {step}")
        return {"eval/accuracy": 0.5}

    async def write(self, step: int) -> None:
        self.calls.append(f"write checkpoint {step}")

    def record(self, step: int, metrics: dict[str, float]) -> None:
        assert step not in self.records
        self.records[step] = metrics


class CheckpointsOf:
    """Apart from the recorder, whose `take` is that of the groups."""

    def __init__(self, parts: Recorder) -> None:
        self._parts = parts
        self.write = parts.write

    async def take(self, step: int) -> None:
        self._parts.calls.append(f"take checkpoint {step}")


def loop_over(
    parts: Any,
    schedule: Schedule,
    stop: asyncio.Event | None = None,
    scorer: Recorder | None = None,
) -> LearnerLoop:
    return LearnerLoop(
        learner=parts,
        publisher=parts,
        groups=parts,
        adapt=parts.adapt,
        evaluation=parts,
        checkpoints=CheckpointsOf(parts),
        record=parts.record,
        schedule=schedule,
        keep_batch=parts.kept.append,
        stop=stop,
        scorer=scorer,
        score_timeout_s=7.0,
    )


def run(schedule: Schedule) -> Recorder:
    parts = Recorder()
    asyncio.run(loop_over(parts, schedule).run())
    return parts


def test_a_step_takes_trains_exports_delivers_and_only_then_releases() -> None:
    calls = run(replace(SCHEDULE, last_step=1, eval_every=0, checkpoint_every=0)).calls
    assert calls == [
        *("eval 0", "take 0", "step 0", "export 1"),
        *("take checkpoint 1", "deliver 1", "release", "eval 1", "write checkpoint 1"),
    ]


def test_a_scorer_elsewhere_is_asked_before_each_step_and_its_answer_goes_to_the_learner() -> None:
    parts = Recorder()
    asyncio.run(loop_over(parts, replace(SCHEDULE, last_step=2, eval_every=0), scorer=parts).run())
    asked = [call for call in parts.calls if call.startswith(("score", "step"))]
    assert asked == ["score", "step 0", "score", "step 1"]
    assert parts.scores == [["scores of 0"]] * 2 and parts.asked_scores == [(1, 7.0)] * 2
    assert parts.records[2]["time/wait_scores"] >= 0
    assert run(SCHEDULE).scores == [None] * 4


def test_on_shared_devices_nothing_is_generated_while_the_learner_steps() -> None:
    parts = Recorder()
    parts.shares_devices = True
    schedule = replace(SCHEDULE, last_step=2, eval_every=1, checkpoint_every=0, max_staleness=0)
    asyncio.run(loop_over(parts, schedule).run())
    asleep = False
    for call in parts.calls:
        asleep = asleep or call == "make room"
        if call.startswith("step"):
            assert asleep
        if call.startswith("export"):
            asleep = False  # the transport wakes them
        if call.startswith(("eval", "deliver")):
            assert not asleep, parts.calls
    assert parts.calls.count("make room") == 2
    assert parts.calls.index("eval 1") < parts.calls.index("step 1")


class Mixed(Recorder):
    """Steps of three groups from two data sets; one completion of four has no verdict."""

    async def take(self, version: int, deadline_s: float) -> list[Any]:
        one = receipt(0, version, 0)
        none = replace(one, reward_mean=float("nan"), accuracy_mean=float("nan"), num_unscored=2)
        return [
            replace(one, source="math", reward_mean=1.0, accuracy_mean=0.5, rewards_equal=True),
            replace(one, source="math", reward_mean=0.25, accuracy_mean=0.5, num_unscored=1),
            replace(none, source="code"),
        ]

    def trained(self, step: int, receipts: list[GroupReceipt]) -> None:
        assert len(receipts) == 3


def test_each_data_set_is_counted_apart() -> None:
    parts = Mixed()
    asyncio.run(loop_over(parts, replace(SCHEDULE, last_step=1)).run())
    found = {name: value for name, value in parts.records[1].items() if name.startswith("source/")}
    assert found == {
        "source/math/reward": 0.75,  # (2 * 1 + 1 * 0.25) / 3
        "source/math/accuracy": 0.5,
        "source/math/groups": 2.0,
        "source/math/equal_rewards": 1.0,
        "source/math/unscored": 1.0,
        "source/math/tokens": 20.0,
        "source/code/reward": 0.0,
        "source/code/accuracy": 0.0,
        "source/code/groups": 1.0,
        "source/code/equal_rewards": 0.0,
        "source/code/unscored": 2.0,
        "source/code/tokens": 10.0,
    }
    assert {in_table(name) for name in found} <= METRICS.keys()
    assert not any(name.startswith("source/") for name in run(SCHEDULE).records[1])


def calls_while_the_first_delivery_hangs(newest_token: int) -> list[str]:
    """What the loop does until it can do no more, with version 1 not arriving."""

    async def main() -> list[str]:
        parts = Recorder()
        parts.deliverable.clear()
        parts.newest_token = newest_token
        task = asyncio.create_task(
            loop_over(parts, replace(SCHEDULE, eval_every=0, checkpoint_every=0)).run()
        )
        for _ in range(100):
            await asyncio.sleep(0)
        calls = list(parts.calls)
        parts.deliverable.set()
        await task
        assert [c for c in parts.calls if c.startswith("deliver")] == [
            f"deliver {version}" for version in range(1, 5)
        ]
        return calls

    return asyncio.run(main())


def test_the_next_step_trains_while_the_generators_still_load() -> None:
    calls = calls_while_the_first_delivery_hangs(newest_token=0)
    assert calls[1:] == ["take 0", "step 0", "export 1", "take 1", "step 1"]


def test_a_token_of_an_unproved_version_waits_for_its_proof() -> None:
    calls = calls_while_the_first_delivery_hangs(newest_token=1)
    assert calls[1:] == ["take 0", "step 0", "export 1", "take 1"]


def test_a_token_of_a_proved_version_does_not_wait_for_its_evaluation() -> None:
    """The proof comes first and the evaluation beside the next step, which may take minutes."""

    async def main() -> list[str]:
        parts, evaluated = Recorder(), asyncio.Event()
        parts.newest_token = 1
        parts.deliverable.clear()
        evaluate = parts.run

        async def hang(step: int) -> dict[str, float]:
            metrics = await evaluate(step)
            if step == 1:
                await evaluated.wait()
            return metrics

        parts.run = hang  # type: ignore[method-assign]
        schedule = replace(SCHEDULE, eval_every=1, last_step=2, checkpoint_every=0)
        task = asyncio.create_task(loop_over(parts, schedule).run())
        for _ in range(100):
            await asyncio.sleep(0)
        assert parts.calls[-1] == "take 1"  # the token is there, its version is not
        parts.deliverable.set()
        for _ in range(100):
            await asyncio.sleep(0)
        calls = list(parts.calls)
        evaluated.set()
        await task
        return calls

    calls = asyncio.run(main())
    assert calls[-1] == "step 1" and "eval 1" in calls, calls


def test_a_failed_delivery_ends_the_loop_even_while_it_waits_for_groups() -> None:
    class Broken(Recorder):
        async def deliver(self, exported: Exported) -> dict[str, float]:
            raise WeightsError("corrupt")

        async def take(self, version: int, deadline_s: float) -> list[Any]:
            if version > 0:
                await asyncio.sleep(60.0)
            return await super().take(version, deadline_s)

    with pytest.raises(ExceptionGroup) as caught:
        asyncio.run(asyncio.wait_for(loop_over(Broken(), SCHEDULE).run(), 5.0))
    assert isinstance(first_cause(caught.value), WeightsError)


def test_evaluations_and_checkpoints_fall_on_their_steps_and_on_the_last() -> None:
    parts = run(SCHEDULE)
    assert [call for call in parts.calls if call.startswith("eval")] == [
        "eval 0",
        "eval 2",
        "eval 4",
    ]
    assert [call for call in parts.calls if "checkpoint" in call] == [
        *("take checkpoint 3", "write checkpoint 3", "take checkpoint 4", "write checkpoint 4"),
    ]
    assert sorted(parts.records) == [0, 1, 2, 3, 4]
    assert parts.records[4]["policy_version"] == 4
    assert parts.records[0]["canary/gap"] == parts.gap  # of the version that was published first


def test_a_resumed_run_does_not_evaluate_or_train_its_past_again() -> None:
    parts = run(replace(SCHEDULE, first_step=3))
    assert parts.calls[0] == "take 3"
    assert sorted(parts.records) == [4]


class Stopped(Recorder):
    """Asked to stop in the middle of a step, or while it waits for groups that never come."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where, self.stop = where, asyncio.Event()

    async def step(
        self, receipts: list[Any], version: int, staleness: int, scores: Any = None
    ) -> dict[str, float]:
        if self.where == f"step {version}":
            self.stop.set()
        return await super().step(receipts, version, staleness)

    async def take(self, version: int, deadline_s: float) -> list[Any]:
        taken = await super().take(version, deadline_s)
        if self.where == f"take {version}":
            asyncio.get_running_loop().call_later(0.01, self.stop.set)
            await asyncio.sleep(60.0)
        return taken


@pytest.mark.parametrize(
    ("where", "last_calls"),
    [
        ("step 1", ["take checkpoint 2", "deliver 2", "release", "eval 2", "write checkpoint 2"]),
        ("take 2", ["take 2", "take checkpoint 2", "write checkpoint 2"]),
        ("take 3", ["write checkpoint 3", "take 3"]),  # the schedule has taken it
        ("take 0", ["eval 0", "take 0"]),  # nothing was trained
    ],
)
def test_asked_to_stop_it_saves_what_is_trained_and_begins_nothing(
    where: str, last_calls: list[str]
) -> None:
    async def main() -> list[str]:
        parts = Stopped(where)
        await asyncio.wait_for(loop_over(parts, SCHEDULE, parts.stop).run(), 5.0)
        return parts.calls

    assert asyncio.run(main())[-len(last_calls) :] == last_calls


class SlowDisk(Recorder):
    """Checkpoints are written when `disk` is set; their step must be on record by then."""

    def __init__(self) -> None:
        super().__init__()
        self.disk = asyncio.Event()

    async def write(self, step: int) -> None:
        assert step in self.records
        await self.disk.wait()
        await super().write(step)


def test_steps_go_on_beside_a_checkpoint_and_one_is_written_at_a_time() -> None:
    async def main() -> tuple[list[str], list[str]]:
        parts = SlowDisk()
        schedule = replace(SCHEDULE, last_step=9, checkpoint_every=2, eval_every=0)
        task = asyncio.create_task(loop_over(parts, schedule).run())
        for _ in range(200):
            await asyncio.sleep(0)
        before = list(parts.calls)
        parts.disk.set()
        await asyncio.wait_for(task, 5.0)
        return before, parts.calls

    before, calls = asyncio.run(main())
    assert "step 3" in before and "step 4" not in before
    assert before.count("take checkpoint 2") == 1 and "take checkpoint 4" not in before
    order = [call.split()[0] for call in calls if "checkpoint" in call]
    assert order == ["take", "write"] * 5


def test_a_checkpoint_that_cannot_be_written_ends_the_loop() -> None:
    class FullDisk(Recorder):
        async def write(self, step: int) -> None:
            raise OSError("no space left on device")

        async def take(self, version: int, deadline_s: float) -> list[Any]:
            if version >= SCHEDULE.checkpoint_every:
                await asyncio.sleep(60.0)
            return await super().take(version, deadline_s)

    with pytest.raises(ExceptionGroup) as caught:
        asyncio.run(asyncio.wait_for(loop_over(FullDisk(), SCHEDULE).run(), 5.0))
    assert "no space" in str(first_cause(caught.value))


def test_the_batch_of_a_step_that_ends_the_run_by_its_numbers_is_kept() -> None:
    parts = Recorder()
    parts.broken_at = 2
    with pytest.raises(ExceptionGroup) as raised:
        asyncio.run(loop_over(parts, SCHEDULE).run())
    assert raised.group_contains(NumbersError, match="nan")
    (batch,) = parts.kept
    assert [receipt.dispatch_version for receipt in batch] == [2]
