"""The staleness bound under adversarial schedules: random speeds, stragglers, drops, lost
groups, deaths with resume from a checkpoint, S from 0 to 8."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up_groups import receipt

from common.budget import GroupWindow, StalenessBudget


@dataclass
class Checkpoint:
    version: int = 0
    done: list[int] = field(default_factory=list)
    outstanding: list[int] = field(default_factory=list)
    next_prompt: int = 0


class Simulation:
    """Learner, publishing and generators as bare state, driven one event at a time."""

    def __init__(self, max_staleness: int, prompts: int) -> None:
        self.max_staleness, self.prompts = max_staleness, prompts
        self.next_id = 0
        self.saved = Checkpoint()
        self.resume()

    def resume(self) -> None:
        """Everything dies; a new process goes on from the checkpoint."""
        saved = self.saved
        self.budget = StalenessBudget(self.max_staleness, self.prompts)
        self.window = GroupWindow(self.max_staleness, self.prompts)
        self.learner = self.published = saved.version
        self.running: dict[int, int] = {}
        self.trained: list[int] = []  # group ids, of this process
        self.prompt_of: dict[int, int] = {}
        self.done = list(saved.done)  # prompts trained on or filtered
        self.reissue, self.next_prompt = list(saved.outstanding), saved.next_prompt

    def save(self) -> None:
        held = [self.prompt_of[group] for group in self.window.outstanding()]
        self.saved = Checkpoint(
            self.learner, list(self.done), sorted(held + self.reissue), self.next_prompt
        )

    def dispatch_all(self) -> None:
        while self.budget.try_acquire():
            group, self.next_id = self.next_id, self.next_id + 1
            if self.reissue:
                self.prompt_of[group] = self.reissue.pop(0)
            else:
                self.prompt_of[group] = self.next_prompt
                self.next_prompt += 1
            self.window.dispatch(group, self.published)
            self.running[group] = self.published

    def finish(self, choice: int, drop: bool) -> None:
        group = sorted(self.running)[choice % len(self.running)]
        version = self.running.pop(group)
        self.window.complete(receipt(group, version, version))
        if drop:
            self.window.drop(group)
            self.budget.release(1)
            self.done.append(self.prompt_of[group])

    def lose(self, choice: int) -> None:
        """Its generator died: the prompt goes out again, under the weights held then."""
        group = sorted(self.running)[choice % len(self.running)]
        del self.running[group]
        self.window.drop(group)
        self.budget.release(1)
        self.reissue.append(self.prompt_of[group])

    def step(self) -> bool:
        taken = self.window.take(self.learner)
        if taken is None:
            return False
        for group in taken:
            assert self.learner - group.min_version <= self.max_staleness
            self.trained.append(group.group_id)
            self.done.append(self.prompt_of[group.group_id])
        self.learner += 1
        return True

    def publish(self) -> bool:
        """One version reaches every generator."""
        if self.published == self.learner:
            return False
        self.published += 1
        self.budget.release(self.prompts)
        return True

    def happens(self, event: str, choice: int) -> None:
        if event in ("finish", "drop", "lose") and not self.running:
            return
        if event == "lose":
            self.lose(choice)
        elif event in ("finish", "drop"):
            self.finish(choice, drop=event == "drop")
        else:
            {"step": self.step, "publish": self.publish, "save": self.save, "die": self.resume}[
                event
            ]()
        self.dispatch_all()

    def finish_all(self) -> None:
        while self.running:
            self.finish(0, drop=False)
        while self.step():
            pass


EVENTS = st.lists(
    st.tuples(
        st.sampled_from(
            ["finish", "finish", "finish", "drop", "lose", "step", "publish", "save", "die"]
        ),
        st.integers(0, 999),
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
        simulation.happens(event, choice)
        assert simulation.window.missing(simulation.learner) <= prompts
    # From any state, finishing what runs lets the learner go on: no deadlock, nobody starves.
    for _ in range(3 * (max_staleness + 2)):
        while simulation.publish():
            pass
        simulation.dispatch_all()
        steps = simulation.learner
        simulation.finish_all()
        assert simulation.learner > steps
    oldest_left = min(simulation.window.outstanding(), default=simulation.next_id)
    assert oldest_left > max(simulation.trained) - (max_staleness + 1) * prompts
    # Through deaths and resumes no prompt was skipped, none was trained on twice.
    left = [simulation.prompt_of[group] for group in simulation.window.outstanding()]
    assert sorted(simulation.done + left + simulation.reissue) == list(
        range(simulation.next_prompt)
    )


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


def counted_anew(window: GroupWindow, version: int, staleness: int, prompts: int) -> int:
    """`GroupWindow.missing` by its definition, over all groups."""
    ready = [group.dispatch_version for group in window._complete.values()]
    held = [*window._dispatched.values(), *ready]
    missing = [prompts - len(ready)]
    for edge in set(held):
        older = sum(since <= edge for since in held)
        places_left = (edge + staleness - version) * prompts
        missing.append(older - places_left - sum(since <= edge for since in ready))
    return max(*missing, 0)


@given(
    staleness=st.integers(0, 4),
    prompts=st.integers(1, 4),
    acts=st.lists(
        st.tuples(st.sampled_from(["dispatch", "complete", "drop", "take"]), st.integers(0, 9))
    ),
)
def test_what_is_missing_is_counted_as_groups_come_and_go(
    staleness: int, prompts: int, acts: list[tuple[str, int]]
) -> None:
    window, version, dispatched = GroupWindow(staleness, prompts), 0, 0
    for act, number in acts:
        out, complete = list(window._dispatched), list(window._complete)
        if act == "dispatch":
            window.dispatch(dispatched, number)
            dispatched += 1
        elif act == "complete" and out:
            # Of whatever version its receipt says that it was dispatched at.
            window.complete(receipt(out[number % len(out)], number % 3, 0))
        elif act == "drop" and (known := out + complete):
            window.drop(known[number % len(known)])
        elif act == "take":
            expected = counted_anew(window, number, staleness, prompts) == 0
            assert (window.take(number) is not None) == expected
        for version in range(12):
            assert window.missing(version) == counted_anew(window, version, staleness, prompts)


def test_all_free_slots_are_taken_at_once() -> None:
    budget = StalenessBudget(1, 3)
    assert budget.try_acquire()
    assert budget.acquire_free() == 5
    assert budget.acquire_free() == 0
    assert not budget.try_acquire()
    budget.release(2)
    assert budget.acquire_free() == 2


def test_slots_cannot_be_given_back_twice() -> None:
    budget = StalenessBudget(0, 2)
    assert budget.try_acquire()
    with pytest.raises(ValueError, match="2 slots, 1 in use"):
        budget.release(2)
