"""The budget of restarts: which errors are worth one, how long a run waits, and when it stops."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from ray.exceptions import ActorDiedError, OwnerDiedError, RayTaskError

from common.config.sections import RestartConfig
from common.errors import (
    RefutedError,
    RunError,
    StallError,
    StartError,
    UserError,
    VerifierError,
    WeightsError,
)
from common.supervision.waits import Waits
from deploy.run.directory import explained
from deploy.run.restart_budget import RestartBudget, is_recoverable


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_too_many_in_a_window_end_the_run_with_their_causes() -> None:
    clock = Clock()
    restarts = RestartBudget(RestartConfig(limit=2, window_s=100.0, backoff_s=3.0), clock)
    assert restarts.after(StallError("first\nwith a report")) == 3.0
    clock.now = 60.0
    assert restarts.after(StallError("second")) == 6.0
    clock.now = 99.0
    with pytest.raises(RunError) as raised:
        restarts.after(WeightsError(""))
    message = str(raised.value)
    assert "3 failures within 100 s, more than restart.limit=2" in message
    assert "99 s ago: StallError: first\n" in message
    assert "39 s ago: StallError: second\n" in message
    assert "0 s ago: WeightsError: WeightsError('')" in message


def test_old_restarts_are_forgiven() -> None:
    clock = Clock()
    restarts = RestartBudget(RestartConfig(limit=1, window_s=100.0, backoff_s=3.0), clock)
    for now in (0.0, 100.0, 200.0):
        clock.now = now
        assert restarts.after(StallError("again")) == 3.0


def test_slow_failures_that_lead_nowhere_end_the_run_and_steps_forgive_them() -> None:
    """Each outlasts the window: a deadline of ten minutes at every start."""
    clock = Clock()
    restarts = RestartBudget(RestartConfig(limit=2, window_s=100.0, backoff_s=3.0), clock)
    for number, step in enumerate((0, 0, 5, 5, 7, 6)):
        clock.now = 1000.0 * number
        assert restarts.after(StallError("again"), step) == 3.0
    clock.now += 1000.0
    with pytest.raises(RunError, match=r"(?s)3 failures in a row without .* than 7.*again"):
        restarts.after(StallError("again"), 7)


def test_none_allowed_means_the_first_ends_the_run() -> None:
    with pytest.raises(RunError, match=r"restart\.limit=0"):
        RestartBudget(RestartConfig(limit=0)).after(StallError("hangs"))


def test_weights_refuted_twice_with_the_same_numbers_are_not_restarted_again() -> None:
    restarts = RestartBudget(RestartConfig(limit=3))
    restarts.after(RefutedError("version 1, generator-0: 0.2437 nats\nlearner: -1.0"), 0)
    restarts.after(RefutedError("version 1, generator-0: 0.2431 nats"), 0)
    with pytest.raises(RunError, match=r"twice(?s:.*)0\.2437 nats(?s:.*)start the run again"):
        restarts.after(
            RefutedError("version 1, generator-0: 0.2437 nats\nlearner: -1.1"),
            0,
            "start the run again",
        )


@pytest.mark.parametrize(
    ("error", "recoverable"),
    [
        (ActorDiedError(), True),
        (OwnerDiedError("00" * 28, None, ""), True),
        (StallError(""), True),
        (WeightsError(""), True),
        (StartError(""), True),
        (VerifierError(""), False),
        (UserError(""), False),
        (RunError("the gradient norm is nan"), False),
        (KeyError("a defect"), False),
    ],
)
def test_lost_processes_are_answered_and_wrong_input_is_not(
    error: Exception, recoverable: bool
) -> None:
    assert is_recoverable(error) == recoverable


def test_what_an_actor_raised_counts_and_not_that_an_actor_raised_it() -> None:
    wrapped = [
        RayTaskError("step", "trace", cause).as_instanceof_cause()
        for cause in (WeightsError("lost"), UserError("wrong"))
    ]
    assert [is_recoverable(error) for error in wrapped] == [True, False]


def test_a_lost_process_is_named_by_what_was_wanted_of_it(tmp_path: Path) -> None:
    async def died() -> None:
        raise ActorDiedError

    async def run() -> None:
        await Waits().on(died(), owner="group 3", cause="its scores from teacher-1", deadline_s=9)

    with pytest.raises(ActorDiedError) as caught:
        asyncio.run(run())
    assert "\n  group 3 waited for its scores from teacher-1\n" in explained(
        caught.value, tmp_path, "advice"
    )
    with pytest.raises(RunError, match=r"ActorDiedError: .* \(group 3 .* from teacher-1\)\n"):
        RestartBudget(RestartConfig(limit=0)).after(caught.value)
