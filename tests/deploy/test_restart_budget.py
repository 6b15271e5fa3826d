"""The budget of restarts: which errors are worth one, how long a run waits, and when it stops."""

from __future__ import annotations

import pytest
from ray.exceptions import ActorDiedError, OwnerDiedError, RayTaskError

from common.config.sections import RestartConfig
from common.errors import (
    RunError,
    StallError,
    StartError,
    UserError,
    VerifierError,
    WeightsError,
)
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
