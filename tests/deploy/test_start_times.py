"""What a run says of its own start."""

from __future__ import annotations

import time

import pytest
from run_process import run_python

from deploy.run.start_times import StartTimes

SLEEPER = """
import time
time.sleep(0.5)
from deploy.run.start_times import process_age
print(process_age())
"""


def test_the_age_of_a_process_has_all_that_was_before_the_question() -> None:
    """The kernel counts in hundredths of a second."""
    began = time.monotonic()
    age = float(run_python("-c", SLEEPER, timeout_s=60).stdout)
    assert 0.5 <= age <= time.monotonic() - began + 0.02


def test_parts_are_on_record_once_and_a_failed_one_never() -> None:
    times = StartTimes()
    with times.part("time/start/ray"):
        time.sleep(0.05)
    with pytest.raises(ValueError, match="broken"), times.part("time/start/learner"):
        raise ValueError("broken")
    found = times.once()
    assert list(found) == ["time/start/ray"]
    assert 0.05 <= found["time/start/ray"] < 5
    assert times.once() == {}
