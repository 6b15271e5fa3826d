"""The ledger: outcomes add up, tickets are lost and repeated nowhere, and resumes take back exactly
what did not survive. A model-based test drives the real generation loop through kills and resumes.
"""

from __future__ import annotations

import asyncio
import shutil
import sqlite3
import tempfile
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)
from made_up_groups import receipt, request
from prompt_sources import small_source
from scripted_rollout import Verifiers, rollout_of

from actors.rollout.group_book import GroupBook
from common.budget import in_time
from common.errors import RunError, UserError
from common.record.ledger import Ledger, Outcomes, outcomes_of
from common.record.parts import NOTHING, Aside
from common.supervision.waits import Waits
from common.trajectory import GroupReceipt, GroupRequest
from deploy.inspector.account import account_of, inspect_ledger, log_problems
from deploy.run.directory import LEDGER

TOKENS = 10
MORE = 3
"""Completions of a follow-up: two that replace the first two, and a probe."""
DRAFTS, PROBES = Aside(2, 7), Aside(1, 4)
HINT = ("algorithm.rollout.follow_up.kind=hint",)
TREE = (
    "algorithm.rollout.follow_up.kind=tree",
    "algorithm.rollout.follow_up.tree.every=2",
    "algorithm.rollout.follow_up.tree.children=[2,2]",
)
"""Two stages, in each of which a group may ask for more."""


def ledger_at(folder: Path, prompts: str = "prompts") -> Ledger:
    return Ledger(folder / LEDGER, prompts)


def test_outcomes_add_up_to_the_group() -> None:
    judged = replace(receipt(1, 0, 0), num_completions=8, num_tokens=80)
    assert outcomes_of(judged, "trained") == {"trained": (8, 80)}
    partly = replace(judged, num_unscored=3, unscored_tokens=25)
    assert outcomes_of(partly, "filtered") == {"filtered": (5, 55), "failed": (3, 25)}
    nobody = replace(judged, num_unscored=8, unscored_tokens=80)
    assert outcomes_of(nobody, "failed") == {"failed": (8, 80)}
    assert outcomes_of(nobody, "trained") == {"failed": (8, 80)}


def test_a_group_is_closed_once(tmp_path: Path) -> None:
    ledger = ledger_at(tmp_path)
    ledger.dispatched(request(0, 0))
    ledger.verified(0, TOKENS)
    ledger.trained(1, [receipt(0, 0, 0)])
    with pytest.raises(RunError, match="closed twice"):
        ledger.trained(2, [receipt(0, 0, 0)])
    with pytest.raises(RunError, match="closed twice"):
        ledger.close_group(7, {"abandoned": (2, 0)})
    account = account_of(tmp_path / LEDGER)
    assert account.closes
    assert (account.completions["trained"], account.tokens["trained"]) == (2, TOKENS)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ("UPDATE outcomes SET tokens = 9", "group 0: 2 completions and 10 tokens"),
        ("DELETE FROM outcomes", "add up to 0 and 0"),
        ("UPDATE groups SET ticket = 3", "3 of the tickets up to 3 were never served"),
        ("INSERT INTO groups SELECT 1, 0, '', 2, 0, 'dispatched', 0, 1, 0, ''", "ticket 0 has 2"),
    ],
)
def test_an_account_that_does_not_close_says_where(
    tmp_path: Path, change: str, problem: str
) -> None:
    ledger = ledger_at(tmp_path)
    ledger.dispatched(request(0, 0))
    ledger.verified(0, TOKENS)
    ledger.trained(1, [receipt(0, 0, 0)])
    with sqlite3.connect(tmp_path / LEDGER) as db:
        db.execute(change)
    account = account_of(tmp_path / LEDGER)
    assert any(problem in found for found in account.problems)
    assert not account.closes


def test_what_the_ledger_says_is_in_the_log(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from made_up_groups import group

    from common.record.trajectory_log import TrajectoryLog

    (tmp_path / "config.yaml").write_text("")
    ledger = ledger_at(tmp_path)
    ledger.dispatched(request(0, 0))
    ledger.verified(0, 4)  # as `group` makes them: three tokens and one
    batch = group(0)
    log = TrajectoryLog(tmp_path / "trajectories", batch.schema)
    log.append(batch)
    assert log_problems(tmp_path) == []
    assert inspect_ledger(tmp_path) == 1
    assert "go on with it by resume=" in capsys.readouterr().out
    ledger.close_group(0, {"filtered": (2, 4)})
    assert inspect_ledger(tmp_path) == 0
    ledger.dispatched(request(1, 1))
    ledger.verified(1, 4)
    assert log_problems(tmp_path) == ["group 1: 4 tokens in the ledger, 0 in the log"]
    assert inspect_ledger(tmp_path) == 1
    with pytest.raises(UserError, match="there is no run"):
        inspect_ledger(tmp_path / "nothing")


def test_a_ledger_of_other_prompts_or_another_run_is_refused(tmp_path: Path) -> None:
    ledger_at(tmp_path).cut(3)
    with pytest.raises(UserError, match="resume with the same data"):
        ledger_at(tmp_path, "others")
    with pytest.raises(UserError, match="knows of no checkpoint of step 4"):
        ledger_at(tmp_path).roll_back(4)
    (tmp_path / "text").write_text("not a database, but long enough to be looked at" * 40)
    with pytest.raises(UserError, match="is damaged: file is not a database"):
        Ledger(tmp_path / "text", "prompts")
    with pytest.raises(UserError, match="has no ledger"):
        account_of(tmp_path / "nowhere")


def test_a_full_disk_is_an_error_that_says_so(tmp_path: Path) -> None:
    ledger = ledger_at(tmp_path)
    ledger._db.execute("PRAGMA max_page_count = 1")

    def fill(first: int = 0) -> None:
        for group_id in range(first, first + 10_000):
            ledger.dispatched(request(group_id, group_id))

    with pytest.raises(RunError, match="database or disk is full"):
        fill()
    with pytest.raises(RunError, match="database or disk is full"), ledger.together():
        fill(10_000)


def test_what_is_written_together_is_there_together_or_not_at_all(tmp_path: Path) -> None:
    """Another process sees what a kill would leave."""
    ledger = ledger_at(tmp_path)

    def groups_on_record() -> int:
        with sqlite3.connect(tmp_path / LEDGER) as db:
            (count,) = db.execute("SELECT count(*) FROM groups").fetchone()
        return int(count)

    with ledger.together():
        for group_id in range(3):
            ledger.dispatched(request(group_id, group_id))
        assert groups_on_record() == 0
    assert groups_on_record() == 3
    with pytest.raises(RunError, match="closed twice"), ledger.together():
        ledger.dispatched(request(3, 3))
        ledger.close_group(0, {"abandoned": (2, 0)}, again=True)
        ledger.close_group(0, {"abandoned": (2, 0)}, again=True)
    assert groups_on_record() == 3
    assert [group.group_id for group in ledger.open_groups()] == [0, 1, 2]
    assert account_of(tmp_path / LEDGER).problems == []


def test_nothing_goes_out_or_on_before_the_ledger_has_it(tmp_path: Path) -> None:
    """A group is on record at each of its points; those that change together cost one commit."""
    ledger = ledger_at(tmp_path)
    commits: list[str] = []
    ledger._db.set_trace_callback(lambda said: commits.append(said) if said == "COMMIT" else None)
    seen: list[tuple[str, list[str]]] = []

    def at(point: str) -> bool:
        with sqlite3.connect(tmp_path / LEDGER) as db:
            seen.append((point, [state for (state,) in db.execute("SELECT state FROM groups")]))
        return False

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("actors.rollout.group_book.reached", at)
        book = GroupBook(ledger, Waits(), max_staleness=0, groups_per_step=2)
        book.dispatched([request(0, 0), request(1, 1)])
        book.verified([receipt(0, 0, 0), receipt(1, 0, 0)])
    assert seen == [
        *[("group dispatched", ["dispatched"] * 2)] * 2,
        *[("group in the log", ["dispatched"] * 2)] * 2,
        *[("group verified", ["verified"] * 2)] * 2,
    ]
    assert len(commits) == 2


def test_a_resume_keeps_to_the_bound() -> None:
    """Six groups of version 4 at step 5, two a step: with S = 2 four of them are in time."""
    found = [receipt(group, 4, 4) for group in range(6)]
    assert [r.group_id for r in in_time(found, 5, 2, 2)] == [0, 1, 2, 3]
    assert in_time(found, 5, 0, 2) == []
    younger = receipt(9, 5, 5)
    assert [r.group_id for r in in_time([younger, *found], 5, 1, 2)] == [0, 1, 9]


class Storage:
    """What survives a kill: the trajectory log."""

    def __init__(self) -> None:
        self.logged: dict[int, GroupReceipt] = {}


class Writer:
    """The trajectory log's writer on `storage`; its receipts know the request they answer."""

    def __init__(self, storage: Storage, generators: Generators) -> None:
        self.storage, self.generators = storage, generators
        self.append, self.recover = Method(self._append), Method(self._recover)

    def _append(self, sizes: list[int], *refs: str) -> list[GroupReceipt]:
        groups = iter(refs)
        return [self._append_one([next(groups) for _ in range(size)]) for size in sizes]

    def _append_one(self, refs: list[str]) -> GroupReceipt:
        _, group_id = refs[0].split()
        asked, kind, version = self.generators.ended[int(group_id)]
        unscored = {"unjudged": 2, "partly": 1}.get(kind, 0)
        drafts, probes, learnt = NOTHING, NOTHING, 2
        if self.generators.grows:
            learnt += MORE * (len(refs) - 1)
        elif len(refs) > 1:
            drafts, probes = DRAFTS, PROBES
        made = replace(
            receipt(asked.group_id, asked.dispatch_version, asked.dispatch_version),
            ticket=asked.ticket,
            max_version=version,
            num_completions=1 if kind == "cut" else learnt,
            rewards_equal=kind == "equal",
            num_unscored=unscored,
            unscored_tokens=unscored * TOKENS // 2,
            drafts=drafts,
            probes=probes,
        )
        self.storage.logged[asked.group_id] = made
        return made

    def _recover(self, group_ids: list[int]) -> list[GroupReceipt]:
        return [self.storage.logged[i] for i in group_ids if i in self.storage.logged]


class Method:
    """`actor.method`, as Ray has it."""

    def __init__(self, work: Any) -> None:
        self.work = work

    async def remote(self, *arguments: Any) -> Any:
        return self.work(*arguments)


class Generators:
    """Groups end when the test says so."""

    def __init__(self, version: int, grows: bool) -> None:
        self.version, self.grows = version, grows
        self.waiting: dict[int, tuple[GroupRequest, asyncio.Future[str]]] = {}
        self.ended: dict[int, tuple[GroupRequest, str, int]] = {}
        self.later: dict[int, asyncio.Future[None]] = {}

    async def generate(self, asked: GroupRequest, deadline_s: float) -> AsyncIterator[str]:
        end: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.waiting[asked.group_id] = asked, end
        kind = await end
        self.ended[asked.group_id] = asked, kind, self.version
        if kind != "nothing":
            yield f"batch {asked.group_id}"

    async def follow_up(
        self, asked: GroupRequest, judged: list[str], told: Any, deadline_s: float
    ) -> AsyncIterator[str]:
        """Some groups ask for as much as makes their first completions drafts, and for probes."""
        follows = self.ended[asked.group_id][1] == "followed"
        told(MORE if follows else 0)
        if follows:
            self.later[asked.group_id] = asyncio.get_running_loop().create_future()
            await self.later[asked.group_id]
            self.ended[asked.group_id] = asked, "followed", self.version
            yield f"later {asked.group_id}"


class RunThroughDeaths(RuleBasedStateMachine):
    """The real loop, book, ledger and prompt source; a dictionary of tickets as the reference."""

    follow_up = HINT

    @initialize(staleness=st.integers(0, 8), prompts=st.integers(1, 3), size=st.integers(1, 9))
    def begin(self, staleness: int, prompts: int, size: int) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.events = asyncio.new_event_loop()
        self.storage, self.size = Storage(), size
        self.staleness, self.prompts = staleness, prompts
        self.lineage: list[list[int]] = []  # tickets trained, step by step, that survived
        self.dropped: set[int] = set()  # tickets closed for good without training
        self.saved: int = 0
        self.state: dict[str, Any] = {}
        self.start(0, fresh=True)

    def start(self, step: int, *, fresh: bool = False) -> None:
        self.source = small_source(self.size)
        self.ledger = ledger_at(self.folder, self.source.identity)
        self.generators = Generators(step, grows=self.follow_up is TREE)
        self.writer = Writer(self.storage, self.generators)
        rollout = rollout_of(
            self.source,
            self.writer,
            Verifiers(),
            self.generators,
            f"batch.prompts_per_step={self.prompts}",
            f"generator.max_staleness={self.staleness}",
            *self.follow_up,
            ledger=self.ledger,
        )
        self.book, self.rollout = rollout.book, rollout.state
        self.learner = step
        if fresh:
            self.state = self.rollout.save(0)
        else:
            self.spin(self.rollout.resume(step, self.state))
        self.running = self.events.create_task(rollout.loop.run())
        self.spin()

    def spin(self, work: Any = None) -> Any:
        """Let everything happen that can."""

        async def rounds() -> Any:
            found = await work if work is not None else None
            for _ in range(30):
                await asyncio.sleep(0)
            return found

        return self.events.run_until_complete(rounds())

    @rule(
        choice=st.integers(0, 99),
        kind=st.sampled_from(
            ["kept", "kept", "followed", "followed", "partly", "equal", "cut", "nothing"]
        ),
    )
    def a_group_ends(self, choice: int, kind: str) -> None:
        waiting = [group for group, (_, end) in self.generators.waiting.items() if not end.done()]
        if not waiting:
            return
        asked, end = self.generators.waiting[waiting[choice % len(waiting)]]
        end.set_result(kind)
        self.spin()
        if kind in ("equal", "cut", "nothing"):
            self.dropped.add(asked.ticket)

    @rule(choice=st.integers(0, 99))
    def a_follow_up_ends(self, choice: int) -> None:
        waiting = [end for end in self.generators.later.values() if not end.done()]
        if waiting:
            waiting[choice % len(waiting)].set_result(None)
            self.spin()

    @rule()
    def the_learner_steps(self) -> None:
        if self.book._window.missing(self.learner):
            return
        taken = self.spin(self.book.take(self.learner, 5.0))
        assert len(taken) == self.prompts
        for group in taken:
            assert self.learner - group.min_version <= self.staleness
            assert group.max_version <= self.learner
        self.learner += 1
        self.book.trained(self.learner, taken)
        self.lineage.append([group.ticket for group in taken])

    @precondition(lambda self: self.generators.version < self.learner)
    @rule()
    def a_version_is_published(self) -> None:
        self.generators.version += 1
        self.spin(self.book.release())

    @precondition(lambda self: self.generators.version == self.learner)
    @rule()
    def a_checkpoint_is_written(self) -> None:
        self.state, self.saved = self.rollout.save(self.learner), self.learner

    def die(self) -> None:
        self.running.cancel()
        self.spin()
        self.lineage = self.lineage[: self.saved]

    @rule()
    def killed(self) -> None:
        self.die()
        self.ledger._db.close()
        self.start(self.saved)

    @rule()
    def stopped_in_order(self) -> None:
        self.die()
        self.ledger.end()
        assert account_of(self.folder / LEDGER).closes
        self.start(self.saved)

    @rule()
    def goes_on_more_strictly(self) -> None:
        """A resume with a smaller bound."""
        if self.staleness == 0:
            return
        self.die()
        self.ledger.end()
        self.staleness -= 1
        self.start(self.saved)

    @rule()
    def nothing_is_in_the_way(self) -> None:
        """From any state: once all is published and what runs has ended, the learner goes on."""
        while self.generators.version < self.learner:
            self.a_version_is_published()
        before = self.learner
        for _ in range((self.staleness + 1) * self.prompts):
            for _ in self.follow_up[:2]:  # as often as a group may ask
                self.a_follow_up_ends(0)
            self.a_group_ends(0, "kept")
        self.the_learner_steps()
        assert self.learner == before + 1

    @invariant()
    def the_account_holds(self) -> None:
        assert not self.running.done()
        account = account_of(self.folder / LEDGER)
        assert account.problems == []
        trained = [ticket for step in self.lineage for ticket in step]
        assert len(trained) == len(set(trained))
        assert not self.dropped & set(trained)
        groups = self.ledger.open_groups()
        out = [group.ticket for group in groups]
        next_ticket, again = self.ledger.cursor()
        counted = [*trained, *self.dropped, *out, *again]
        assert sorted(counted) == list(range(next_ticket))
        failed = account.completions["failed"]
        assert account.completions["trained"] + failed >= 2 * len(trained)
        assert account.generated == sum(account.tokens.values()) + account.open_tokens

    def teardown(self) -> None:
        if hasattr(self, "events"):
            self.die()
            self.ledger.end()
            assert account_of(self.folder / LEDGER).closes
            self.events.close()
            shutil.rmtree(self.folder)


RunThroughDeaths.TestCase.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None
)
test_runs_through_deaths = RunThroughDeaths.TestCase


class TreesThroughDeaths(RunThroughDeaths):
    """Groups that ask for more twice, and train on all of it."""

    follow_up = TREE


TreesThroughDeaths.TestCase.settings = settings(
    max_examples=40, stateful_step_count=40, deadline=None
)
test_trees_through_deaths = TreesThroughDeaths.TestCase


def test_a_version_that_a_kill_took_back_is_not_trained_on() -> None:
    """Tickets 0 and 1 go out at version 0; 0 is trained, 1 ends under version 1; then all dies."""
    machine = RunThroughDeaths()
    machine.begin(staleness=1, prompts=1, size=5)
    machine.a_group_ends(0, "kept")
    machine.the_learner_steps()
    machine.a_version_is_published()
    machine.a_group_ends(0, "kept")
    machine.killed()
    assert machine.book.status() == "1 groups under way, 1 ready, 2/2 slots"
    assert [group.ticket for group in machine.ledger.open_groups()] == [0, 1]
    machine.the_learner_steps()
    assert machine.lineage == [[0]]
    machine.the_account_holds()
    machine.teardown()


def test_a_run_that_dies_between_the_parts_of_a_group_samples_it_again_whole() -> None:
    machine = RunThroughDeaths()
    machine.begin(staleness=0, prompts=1, size=5)
    machine.a_group_ends(0, "followed")
    (group,) = machine.ledger.open_groups()
    assert group.completions == 2 + MORE
    machine.killed()
    account = account_of(machine.folder / LEDGER)
    assert account.completions["abandoned"] == 2 + MORE
    machine.a_group_ends(0, "followed")
    machine.a_follow_up_ends(0)
    machine.the_learner_steps()
    account = account_of(machine.folder / LEDGER)
    assert {name: account.completions[name] for name in ("trained", "draft", "probe")} == {
        "trained": 2,
        "draft": 2,
        "probe": 1,
    }
    assert account.tokens["draft"] == DRAFTS.tokens
    machine.the_account_holds()
    machine.teardown()


def test_partly_unjudged_groups_close(tmp_path: Path) -> None:
    ledger = ledger_at(tmp_path)
    ledger.dispatched(request(0, 0))
    ledger.verified(0, TOKENS)
    half = replace(receipt(0, 0, 0), num_unscored=1, unscored_tokens=4)
    ledger.trained(1, [half])
    account = account_of(tmp_path / LEDGER)
    assert account.closes
    parts: Outcomes = {"trained": (1, 6), "failed": (1, 4)}
    assert {name: (account.completions[name], account.tokens[name]) for name in parts} == parts


def test_a_tree_whose_run_dies_between_its_levels_is_sampled_again_whole() -> None:
    """Also a checkpoint that is taken in between: the group is open in it, and not whole."""
    machine = TreesThroughDeaths()
    machine.begin(staleness=1, prompts=1, size=5)
    machine.a_group_ends(0, "followed")
    machine.a_follow_up_ends(0)
    open_ = machine.ledger.open_groups()
    assert [group.completions for group in open_] == [2 + 2 * MORE, 2]
    machine.a_checkpoint_is_written()
    machine.killed()
    account = account_of(machine.folder / LEDGER)
    assert account.completions["abandoned"] == 2 + 2 * MORE + 2
    for _ in range(2):
        machine.a_group_ends(0, "followed")
        machine.a_follow_up_ends(0)
        machine.a_follow_up_ends(0)
    machine.killed()  # both are in the log, and come back from there with all that they have
    assert machine.book.status() == "0 groups under way, 2 ready, 2/2 slots"
    machine.the_learner_steps()
    account = account_of(machine.folder / LEDGER)
    assert account.completions["trained"] == 2 + 2 * MORE
    machine.the_account_holds()
    machine.teardown()
