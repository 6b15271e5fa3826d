"""The staleness bound under adversarial schedules: random speeds, stragglers, drops, S 0 to 8."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.budget import GroupWindow, StalenessBudget
from common.trajectory import GroupReceipt


def receipt(group_id: int, dispatched_at: int, oldest_token: int) -> GroupReceipt:
    return GroupReceipt(
        group_id=group_id,
        batch_ref=None,
        dispatch_version=dispatched_at,
        min_version=oldest_token,
        max_version=oldest_token,
        num_completions=2,
        num_tokens=10,
        reward_mean=0.5,
        rewards_equal=False,
        num_unscored=0,
        generate_s=1.0,
    )


class Simulation:
    """Learner, publishing and generators as bare state, driven one event at a time."""

    def __init__(self, max_staleness: int, prompts: int) -> None:
        self.max_staleness, self.prompts = max_staleness, prompts
        self.budget = StalenessBudget(max_staleness, prompts)
        self.window = GroupWindow(max_staleness, prompts)
        self.learner = self.published = 0
        self.next_id = 0
        self.running: dict[int, int] = {}
        self.trained: list[int] = []
        self.dispatched_at: dict[int, int] = {}

    def dispatch_all(self) -> None:
        while self.budget.try_acquire():
            self.window.dispatch(self.next_id, self.published)
            self.running[self.next_id] = self.dispatched_at[self.next_id] = self.published
            self.next_id += 1

    def finish(self, choice: int, drop: bool) -> None:
        group = sorted(self.running)[choice % len(self.running)]
        version = self.running.pop(group)
        self.window.complete(receipt(group, version, version))
        if drop:
            self.window.drop(group)
            self.budget.release(1)

    def step(self) -> bool:
        taken = self.window.take(self.learner)
        if taken is None:
            return False
        for group in taken:
            assert self.learner - group.min_version <= self.max_staleness
            self.trained.append(group.group_id)
        self.learner += 1
        return True

    def publish(self) -> None:
        while self.published < self.learner:
            self.published += 1
            self.budget.release(self.prompts)


EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["finish", "finish", "drop", "step", "publish"]), st.integers(0, 999)
    ),
    max_size=300,
)


@settings(max_examples=500, deadline=None)
@given(st.integers(0, 8), st.integers(1, 5), EVENTS)
def test_no_token_is_older_than_s_and_nobody_waits_for_ever(
    max_staleness: int, prompts: int, events: list[tuple[str, int]]
) -> None:
    simulation = Simulation(max_staleness, prompts)
    simulation.dispatch_all()
    for event, choice in events:
        assert simulation.window.missing(simulation.learner) <= prompts
        if event in ("finish", "drop") and simulation.running:
            simulation.finish(choice, drop=event == "drop")
        elif event == "step":
            simulation.step()
        elif event == "publish":
            simulation.publish()
        simulation.dispatch_all()
    # From any state, finishing what runs lets the learner go on: no deadlock, nobody starves.
    for _ in range(3 * (max_staleness + 2)):
        simulation.publish()
        simulation.dispatch_all()
        steps = simulation.learner
        while simulation.running:
            simulation.finish(0, drop=False)
        while simulation.step():
            pass
        assert simulation.learner > steps
    assert len(simulation.trained) == len(set(simulation.trained))
    oldest_left = min(simulation.window.outstanding(), default=simulation.next_id)
    assert oldest_left > max(simulation.trained) - (max_staleness + 1) * prompts


def test_synchronous_mode_trains_on_policy_only() -> None:
    simulation = Simulation(0, 3)
    simulation.dispatch_all()
    assert simulation.next_id == 3
    simulation.finish(0, drop=False)
    simulation.finish(0, drop=False)
    assert not simulation.step()  # the third group is at its last chance
    simulation.finish(0, drop=False)
    assert simulation.step()
    simulation.dispatch_all()
    assert simulation.next_id == 3  # nothing new before the new weights are out
    simulation.publish()
    simulation.dispatch_all()
    assert simulation.next_id == 6


def test_a_straggler_holds_up_nobody_before_its_last_chance() -> None:
    simulation = Simulation(2, 2)
    simulation.dispatch_all()
    for _ in range(2):  # group 0 straggles; the others finish
        for _ in range(len(simulation.running) - 1):
            simulation.finish(1, drop=False)
        assert simulation.step()
        simulation.publish()
        simulation.dispatch_all()
    while len(simulation.running) > 1:
        simulation.finish(1, drop=False)
    assert simulation.window.missing(simulation.learner) == 1
    assert not simulation.step()
    simulation.finish(0, drop=False)
    assert simulation.step()
    assert 0 in simulation.trained[-2:]


def test_young_groups_do_not_take_the_places_that_old_ones_still_need() -> None:
    simulation = Simulation(3, 4)
    simulation.dispatch_all()  # 0 to 15 at version 0
    for _ in range(11):
        simulation.finish(0, drop=False)
    assert simulation.step()
    assert simulation.step()
    simulation.publish()
    simulation.dispatch_all()  # 16 to 23 at version 2
    simulation.finish(sorted(simulation.running).index(16), drop=False)
    # 8, 9, 10 and 16 are complete, but training 16 would leave 11 to 15 the four places of
    # version 3: one of them would be four versions old.
    assert not simulation.step()
    simulation.finish(0, drop=False)
    assert simulation.step()
    assert simulation.trained[-4:] == [8, 9, 10, 11]


def test_oldest_first() -> None:
    window = GroupWindow(1, 2)
    for group, version in ((0, 1), (1, 0), (2, 1), (3, 0)):
        window.dispatch(group, version)
        window.complete(receipt(group, version, version))
    taken = window.take(1)
    assert taken is not None
    assert [group.group_id for group in taken] == [1, 3]


def test_slots_cannot_be_given_back_twice() -> None:
    budget = StalenessBudget(0, 2)
    assert budget.try_acquire()
    with pytest.raises(ValueError, match="2 slots, 1 in use"):
        budget.release(2)
