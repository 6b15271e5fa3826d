"""Parts of a group: what is folded, what the learner gets, and that every completion is counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from judged_groups import judged, request, said

from common.config.follow_up import FollowUpConfig, TreeConfig
from common.record.ledger import Outcome, outcomes_of
from common.record.parts import (
    BRANCH,
    JOINS,
    NOTHING,
    PROBE,
    REPLACES,
    folded,
    learnt,
    logged_tokens,
)
from common.record.schema import NEWER, current, damaged_column, trajectory_schema
from common.record.trajectory_log import TrajectoryLog, read_log
from common.record.writer import receipt
from deploy.inspector.details import details
from learner.loop import _summary

FIRST = judged(request(), {0: said([4, 5, 6]), 1: said([7])}, [1.0, 0.0])


def probes(of: int, at: int, rewards: list[float | None]) -> pa.RecordBatch:
    parent = FIRST.column("token_ids").to_pylist()[of]
    asked = request(
        part=PROBE,
        continues=of,
        num_completions=len(rewards),
        guidance_ids=tuple(parent[:at]),
        num_guided=len(rewards) if at else 0,
        first_index=2,
    )
    return judged(asked, {i: said([9, 9]) for i in range(len(rewards))}, rewards)


def whole(*parts: pa.RecordBatch) -> pa.RecordBatch:
    return pa.concat_batches(parts).sort_by("completion_index")


def test_probes_become_branches_and_their_values_are_means_over_those_with_a_reward() -> None:
    group = folded(
        whole(FIRST, probes(0, 2, [1.0, None, 0.0]), probes(0, 0, [1.0, 1.0]), probes(1, 0, [None]))
    )
    assert group.drop_columns(["branches"]).equals(FIRST.drop_columns(["branches"]))
    names = ("at", "value", "error", "count", "probes", "tokens", "newest")
    assert [
        [tuple(branch[name] for name in names) for branch in row]
        for row in group.column("branches").to_pylist()
    ] == [[(0, 1.0, 0.0, 2, 2, 4, 3), (2, 0.5, 0.5, 2, 3, 6, 3)], [(0, None, None, 0, 1, 2, 3)]]


def test_a_group_without_follow_ups_is_left_as_it_is() -> None:
    assert folded(FIRST) is FIRST
    assert learnt(FIRST) is FIRST


def test_what_replaces_the_first_makes_drafts_of_them() -> None:
    later = judged(
        request(part=REPLACES, first_index=2, prompt_ids=[1, 2, 4], num_completions=3),
        {i: said([8] * (i + 1)) for i in range(3)},
        [0.0, 1.0, None],
    )
    group = folded(whole(FIRST, later))
    assert learnt(group).equals(later)
    assert group.num_rows == 5


def test_what_joins_the_first_is_learnt_beside_them() -> None:
    later = judged(
        request(part=JOINS, first_index=2, num_completions=1, sampled_behind=(7, 8)),
        {0: said([8, 8])},
        [0.5],
    )
    group = folded(whole(FIRST, later))
    assert learnt(group) is group
    found = receipt(group, None)
    assert (found.num_completions, found.num_tokens) == (3, 6)
    assert (found.drafts, found.probes) == (NOTHING, NOTHING)
    assert outcomes_of(found, "trained") == {"trained": (3, 6)}


@pytest.mark.parametrize("outcome", ["trained", "filtered", "failed", "stale"])
def test_every_completion_and_token_of_a_group_has_one_outcome(outcome: Outcome) -> None:
    later = judged(
        request(part=REPLACES, first_index=2), {0: said([8, 8]), 1: said([8] * 5)}, [1.0, None]
    )
    for parts, sampled, tokens in (
        ((FIRST,), 2, 4),
        ((FIRST, later), 4, 11),
        ((FIRST, probes(0, 2, [1.0, None]), probes(1, 0, [0.0])), 5, 10),
    ):
        logged = folded(whole(*parts))
        assert logged_tokens(logged) == tokens  # which the account and `prune` hold it against
        found = receipt(logged, None)
        booked = outcomes_of(found, outcome)
        assert sum(count for count, _ in booked.values()) == sampled == found.every.completions
        assert sum(count for _, count in booked.values()) == tokens == found.every.tokens


def test_a_receipt_is_of_what_the_learner_gets() -> None:
    later = judged(
        request(part=REPLACES, first_index=2), {0: said([8, 8]), 1: said([8])}, [1.0, 1.0]
    )
    found = receipt(folded(whole(FIRST, later)), None)
    assert (found.num_completions, found.num_tokens) == (2, 3)
    assert found.rewards_equal
    assert (found.drafts.completions, found.drafts.tokens) == (2, 4)


def test_the_version_of_a_probe_is_that_of_its_group() -> None:
    """A value that was measured under a version which a kill took back is not trained on."""
    late = probes(0, 2, [1.0])
    rows = late.to_pylist()
    rows[0]["weight_versions"] = [3, 3, 3, 9]
    late = pa.RecordBatch.from_pylist(rows, schema=late.schema)
    assert receipt(FIRST, None).max_version == 3
    assert receipt(folded(whole(FIRST, late)), None).max_version == 9


def with_columns(batch: pa.RecordBatch, **columns: list[Any]) -> pa.RecordBatch:
    for name, values in columns.items():
        place = batch.schema.get_field_index(name)
        field = batch.schema.field(place)
        batch = batch.set_column(place, field, pa.array(values, field.type))
    return batch


FIRST_ENDED = with_columns(FIRST, finished_s=[3.0, 2.0], suspicious=["", "files"])
PROBED = whole(
    FIRST_ENDED,
    with_columns(
        probes(0, 2, [1.0, 0.0, 0.0]),
        finished_s=[4.0, 9.0, 8.0],
        suspicious=["files,network", "", "judge"],
    ),
    with_columns(probes(1, 0, [None]), finished_s=[7.0], suspicious=["network"]),
)
"""A group that was dispatched at 1.0; one completion and three probes touched walls."""


def summed_up(group: pa.RecordBatch) -> dict[str, float]:
    return _summary([receipt(group, None)])


def test_probes_that_touched_walls_are_counted_and_told_apart() -> None:
    names = ("", "/files", "/judge", "/network", "/processes", "/probes")
    found, first = summed_up(folded(PROBED)), summed_up(FIRST_ENDED)
    assert [found["verdict/suspicious" + name] for name in names] == [4, 2, 1, 2, 0, 3]
    assert [first["verdict/suspicious" + name] for name in names[:-1]] == [1, 1, 0, 0, 0]
    assert "verdict/suspicious/probes" not in first  # the step has no probe
    assert summed_up(folded(whole(FIRST, probes(0, 0, [1.0]))))["verdict/suspicious/probes"] == 0


def test_the_time_of_a_group_ends_with_its_last_probe() -> None:
    assert summed_up(FIRST_ENDED)["time/generate"] == 2.0
    assert summed_up(folded(PROBED))["time/generate"] == 8.0
    early = with_columns(probes(0, 2, [1.0]), finished_s=[2.5])  # clocks may be set back
    assert summed_up(folded(whole(FIRST_ENDED, early)))["time/generate"] == 2.0


def test_what_a_killed_run_finds_in_its_log_says_the_same_of_probes(tmp_path: Path) -> None:
    log = TrajectoryLog(tmp_path, trajectory_schema(["rule"]))
    log.append(folded(PROBED))
    log.close()
    (found,) = read_log(tmp_path)
    assert receipt(found, None) == receipt(folded(PROBED), None)


def test_branches_from_before_their_probes_were_timed_are_read() -> None:
    group = folded(PROBED)
    known = [field for field in BRANCH if field.name not in ("finished_s", "suspicious")]
    of_old = pa.list_(pa.field("item", pa.struct(known), nullable=False))
    rows = [
        [{field.name: branch[field.name] for field in known} for branch in row]
        for row in group.column("branches").to_pylist()
    ]
    place = group.schema.get_field_index("branches")
    old = group.set_column(
        place, pa.field("branches", of_old, nullable=False), pa.array(rows, of_old)
    ).replace_schema_metadata({b"grpo_lambda.schema_version": b"9"})
    assert damaged_column(old.schema) is None
    found = current(old)
    assert found.schema.equals(trajectory_schema(["rule"]), check_metadata=True)
    made = receipt(found, None)
    assert (made.probes, made.suspicious_probes) == (receipt(group, None).probes, ())
    assert made.generate_s == 2.0  # all that it says


def test_a_group_from_before_there_were_parts_is_read_as_one_without() -> None:
    old = FIRST.drop_columns(["part", "sampled_behind", "branches", "feedback"])
    old = old.replace_schema_metadata({b"grpo_lambda.schema_version": b"7"})
    assert learnt(old) is old
    assert current(old).equals(FIRST.cast(trajectory_schema(["rule"])))
    assert set(NEWER) <= set(FIRST.schema.names)


def test_a_group_from_before_there_were_trees_is_read_as_one_that_is_none() -> None:
    old = FIRST.drop_columns(["continues"])
    old = old.replace_schema_metadata({b"grpo_lambda.schema_version": b"8"})
    assert current(old).equals(FIRST.cast(trajectory_schema(["rule"])))
    assert set(FIRST.column("continues").to_pylist()) == {-1}


def test_what_goes_on_from_others_is_booked_with_what_it_sampled_itself() -> None:
    """The tokens that it was given were sampled in another completion, and count there."""
    asked = request(
        part=JOINS, first_index=2, num_completions=2, num_guided=2, guidance_ids=(7, 8), continues=0
    )
    later = judged(asked, {0: said([9]), 1: said([9, 9, 9])}, [1.0, 0.0])
    group = folded(whole(FIRST, later))
    made, first = receipt(group, None), receipt(FIRST, None)
    assert learnt(group) is group
    assert made.num_completions == first.num_completions + 2
    assert made.num_tokens == first.num_tokens + 4 == logged_tokens(group)
    assert (made.drafts, made.probes) == (first.drafts, first.probes)


def test_the_inspector_says_what_a_completion_goes_on_from() -> None:
    asked = request(
        part=JOINS, first_index=2, num_completions=1, num_guided=1, guidance_ids=(7, 8), continues=1
    )
    group = whole(FIRST, judged(asked, {0: said([9])}, [1.0]))
    found = details(group, {}, None)["completions"]
    assert [one["continues"] for one in found] == [-1, -1, 1]
    assert [one["part"] for one in found] == ["", "", "goes on from #1"]


@pytest.mark.parametrize(
    ("kind", "learnt_", "fits"),
    [
        *[("tree", 2, True), ("tree", 12, True), ("tree", 13, False), ("tree", 1, False)],
        *[("none", 2, True), ("none", 3, False), ("refine", 2, True), ("branches", 3, False)],
    ],
)
def test_a_resume_takes_groups_of_the_sizes_that_there_may_be(
    kind: str, learnt_: int, fits: bool
) -> None:
    config = FollowUpConfig(kind=kind, tree=TreeConfig(children=[3, 2]))
    assert config.fits(learnt_, 2) is fits
