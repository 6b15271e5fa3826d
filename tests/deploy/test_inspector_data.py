"""The inspector's data: index and answers against a second computation over the whole log."""

from __future__ import annotations

import functools
import json
import math
import shutil
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from inspector_runs import Sample, SyntheticRun, sums_run
from measured_runs import write_measured

from common.errors import RunError, UserError
from common.record.credit_log import credit_path, read_credit
from common.record.episodes import ENDS
from common.record.trajectory_log import read_log, segments
from common.record.turns import TURN
from deploy.inspector.query import COLUMNS, RANGES, GroupQuery
from deploy.inspector.run_data import RunData
from deploy.inspector.single_file import as_inert_json, bundle, sample
from deploy.inspector.tokens import REPLACEMENT, TokenTexts, load_tokenizer
from deploy.models.tiny_model import build_tokenizer


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of several segments, all closed, one of them without its Parquet twin."""
    path = tmp_path_factory.mktemp("runs") / "finished"
    run = SyntheticRun(path, segment_bytes=40_000)
    group_id = 0
    for step in range(1, 7):
        ids = []
        for _ in range(5):
            rewards = run.random.choice([0.0, 0.25, 1.0], 4).tolist()
            samples = [
                Sample("word " * int(run.random.integers(1, 9)) + f"N{group_id}x{i}", reward)
                for i, reward in enumerate(rewards)
            ]
            if group_id % 7 == 3:
                samples[1] = Sample("late", None, verdict="timeout")
            if group_id % 6 == 4:
                samples[2] = Sample(
                    "ask tell say", 1.0, finish="turns",
                    turns=[(0, 3, None), (4, 8, None), (9, 12, 1.0)], calls=(3, group_id % 4),
                )  # fmt: skip
            if group_id % 9 == 5:
                samples[3] = Sample("ask", None, failure="error", verdict="error")
            run.group(group_id, f"Prompt {group_id * 37 % 11}", samples, max(0, step - 2))
            ids.append(group_id)
            group_id += 1
        run.step(step, ids, credit=step != 4)
    run.group(group_id, "Never trained on", [Sample("left over", 1.0)], 6)
    run.log.close()
    last = segments(path / "trajectories")[1]
    last.with_suffix(".parquet").unlink()
    assert len(segments(path / "trajectories")) >= 3
    return path


def brute_force(path: Path) -> dict[int, dict[str, Any]]:
    """Every group's row of the table, from every token of the log."""
    found = {}
    for batch in read_log(path / "trajectories"):
        rows = batch.to_pylist()
        group_id = rows[0]["group_id"]
        rewards = [row["reward"] for row in rows if row["reward"] is not None]
        sampled = [sum(t["end"] - t["begin"] for t in row["turns"]) for row in rows]
        failed = [row["environment_verdict"] in ("error", "timeout") for row in rows]
        ends = {
            row["environment_verdict"] if has_failed else row["finish_reason"]
            for row, has_failed in zip(rows, failed, strict=True)
        }
        step = group_id // 5 + 1 if group_id < 30 else None
        found[group_id] = {
            "group": group_id,
            "step": step,
            "question": rows[0]["question"],
            "reward": statistics.fmean(rewards),
            "spread": statistics.pstdev(rewards),
            "length": statistics.fmean(sampled),
            "turns": statistics.fmean(len(row["turns"]) for row in rows),
            "tool_errors": sum(turn["failed"] for row in rows for turn in row["turns"]),
            "ends": [end for end in ENDS if end in ends],
            "staleness": None if step is None else step - 1 - rows[0]["dispatch_version"],
            "state": "verified" if step is None else "trained",
            "completions": len(rows),
            "scored": len(rewards),
            "logged": True,
            "texts": [rows[0]["prompt_text"], *(row["text"] for row in rows)],
        }
    return found


def test_every_row_of_the_table_is_what_the_log_says(finished: Path) -> None:
    expected = brute_force(finished)
    answer = RunData(finished).page(GroupQuery(size=500))
    assert answer["total"] == len(expected) == 31
    for row in answer["rows"]:
        assert row.keys() == expected[row["group"]].keys() - {"texts"}
        for name, value in row.items():
            assert value == pytest.approx(expected[row["group"]][name]), (row["group"], name)


def test_questions_that_begin_alike_are_told_apart(tmp_path: Path) -> None:
    run = SyntheticRun(tmp_path / "run")
    opening = "State the final answer to the following arithmetic problem: " * 8
    for group_id in range(2):
        run.group(group_id, f"{opening}Question {group_id}", [Sample("x", 1.0)] * 2, 0)
    run.step(1, [0, 1])
    run.log.close()
    questions = [row["question"] for row in RunData(run.path).page(GroupQuery())["rows"]]
    assert [question[-10:] for question in questions] == ["Question 0", "Question 1"]
    assert all(q.startswith("State the final") and len(q) < 200 for q in questions)


def test_the_index_reads_no_tokens_and_a_search_only_texts(tmp_path: Path, finished: Path) -> None:
    """Twins that have nothing but the scalar columns give the same table."""
    path = tmp_path / "scalars"
    shutil.copytree(finished, path)
    for twin in (path / "trajectories").glob("*.parquet"):
        table = pq.read_table(twin)
        lists = [field.name for field in table.schema if pa.types.is_list(field.type)]
        lists.remove("turns")  # a few numbers a completion
        assert "token_ids" in lists
        pq.write_table(table.drop_columns([*lists, "reference"]), twin)
    for query in (GroupQuery(size=500), GroupQuery(text="word word", sort="length")):
        assert RunData(path).page(query) == opened(finished).page(query)


def test_a_log_from_before_tool_calls_were_counted_has_none(tmp_path: Path) -> None:
    run = SyntheticRun(tmp_path / "run")
    played = Sample("ask tell say", 1.0, turns=[(0, 3, None), (9, 12, 1.0)], calls=(3, 2))
    run.group(0, "Q", [played, Sample("ask", 0.0)])
    run.log.close()
    assert RunData(run.path).facts()["episodes"]
    (row,) = RunData(run.path).page(GroupQuery())["rows"]
    assert (row["turns"], row["tool_errors"]) == (1.5, 2)
    (twin,) = (run.path / "trajectories").glob("*.parquet")
    table = pq.read_table(twin)
    turns = [
        [{k: v for k, v in turn.items() if k not in ("calls", "failed")} for turn in turns]
        for turns in table["turns"].to_pylist()
    ]
    place = table.schema.get_field_index("turns")
    older = pa.list_(pa.struct([field for field in TURN if field.name not in ("calls", "failed")]))
    pq.write_table(table.set_column(place, "turns", pa.array(turns, older)), twin)
    (row,) = RunData(run.path).page(GroupQuery())["rows"]
    assert (row["turns"], row["tool_errors"]) == (1.5, 0)


def test_a_run_of_answers_has_no_episodes(tmp_path: Path) -> None:
    run = SyntheticRun(tmp_path / "run")
    run.group(0, "Q", [Sample("ask", 0.0), Sample("cut", 1.0, finish="length")])
    run.log.close()
    assert not RunData(run.path).facts()["episodes"]
    assert not RunData(SyntheticRun(tmp_path / "empty").path).facts()["episodes"]


BOUNDS = st.none() | st.sampled_from([0.0, 0.25, 0.5, 1.0, 3.0, 5.0, 12.5, 30.0])


@given(
    sort=st.sampled_from(list(COLUMNS)),
    descending=st.booleans(),
    bounds=st.fixed_dictionaries(
        {f"{name}_{end}": BOUNDS for name in RANGES for end in ("min", "max")}
    ),
    text=st.sampled_from(["", "PROMPT 3", "n1", "late", "word word", "nowhere", "100%", "x2"]),
    end=st.sampled_from(["", "", *ENDS]),
    size=st.integers(1, 9),
)
@settings(max_examples=120, deadline=None)
def test_sorting_filtering_and_paging_agree_with_brute_force(
    finished: Path,
    sort: Any,
    descending: bool,
    bounds: dict[str, Any],
    text: str,
    end: Any,
    size: int,
) -> None:
    data = opened(finished)
    expected = [
        row
        for row in brute_forced(finished).values()
        if all(within(row[name], bounds[f"{name}_min"], bounds[f"{name}_max"]) for name in RANGES)
        and (not end or end in row["ends"])
        and any(text.lower() in shown.lower() for shown in row["texts"])
    ]
    # Python's sort is stable: first by group, then by the column, what is missing at the end.
    known = [row for row in expected if row[sort] is not None]
    known.sort(key=lambda row: rounded(row[sort]), reverse=descending)
    if descending and sort != "group":  # reversed ties go back to the order of groups
        known.sort(key=lambda row: row["group"])
        known.sort(key=lambda row: rounded(row[sort]), reverse=True)
    order = [row["group"] for row in known + [row for row in expected if row[sort] is None]]
    got: list[int] = []
    for page in range(1, len(order) // size + 2):
        query = GroupQuery(
            sort=sort, descending=descending, page=page, size=size, text=text, end=end, **bounds
        )
        answer = data.page(query)
        assert answer["total"] == len(order)
        assert answer["searched"] == 1.0
        got += [row["group"] for row in answer["rows"]]
    assert got == order


def within(value: float | None, low: float | None, high: float | None) -> bool:
    if low is None and high is None:
        return True
    return value is not None and (low is None or value >= low) and (high is None or value <= high)


def rounded(value: Any) -> Any:
    """Two ways to sum give the same number but for its last bits."""
    return round(value, 9) if isinstance(value, float) else value


@functools.cache
def opened(path: Path) -> RunData:
    return RunData(path)


@functools.cache
def brute_forced(path: Path) -> dict[int, dict[str, Any]]:
    return brute_force(path)


def test_a_group_has_every_number_of_both_logs(finished: Path) -> None:
    data = RunData(finished)
    logged = {
        b.column("group_id")[0].as_py(): b.to_pylist() for b in read_log(finished / "trajectories")
    }
    credited = {
        (row["group_id"], row["completion_index"]): row
        for step in (1, 2, 3, 5, 6)
        for row in read_credit(finished, step).to_pylist()
    }
    for group_id, rows in logged.items():
        shown = data.group(group_id)
        assert shown is not None
        assert [c["index"] for c in shown["completions"]] == [r["completion_index"] for r in rows]
        for row, completion in zip(rows, shown["completions"], strict=True):
            tokens, credit = completion["tokens"], credited.get((group_id, completion["index"]))
            assert completion["text"] == row["text"]
            assert tokens["id"] == row["token_ids"]
            assert tokens["version"] == row["weight_versions"]
            assert tokens["in_loss"] == row["loss_mask"]
            assert same_float32(tokens["behaviour_logprob"], row["behaviour_logprobs"])
            assert completion["verdicts"]["math_answer"]["verdict"] == row["verdict/math_answer"]
            assert "".join(tokens["text"]).startswith(row["text"])
            assert completion["advantage"] == (credit and credit["advantage"])
            for name, column in (
                ("advantage", "advantages"),
                ("trace_weight", "trace_weights"),
                ("logprob", "logprobs"),
                ("score", "scores"),
                ("value", "values"),
            ):
                assert same_float32(tokens[name], credit and credit[column]), (group_id, name)
    without = data.group(15)
    assert without is not None and "step 4 has no credit" in without["note"]
    never = data.group(30)
    assert never is not None and "no learner step" in never["note"]
    assert data.group(31) is None


def test_measured_values_are_those_of_the_file(tmp_path: Path) -> None:
    run = sums_run(tmp_path / "run", steps=1)
    data, group_id = RunData(run.path), min(run.groups)
    before = data.group(group_id)
    assert before is not None
    assert all(each["measured"] is None for each in before["completions"])
    branches = {1: {0: [1.0, 0.0, 0.0, 0.0], 2: [], 4: [1.0]}}
    (found,) = write_measured(run.path, 1, run.groups[group_id], branches)
    seen = data.state.version
    assert data.refresh().version != seen  # a page that is open is told
    group = data.group(group_id)
    assert group is not None
    first, second, *others = (each["measured"] for each in group["completions"])
    assert first is None and not any(others)
    assert [(each["begin"], each["end"]) for each in second] == found.segments
    assert [each["value"] for each in second] == [0.25, None, 1.0]
    assert [each["continuations"] for each in second] == [4, 0, 1]
    assert second[0]["value_error"] == found.errors_J[0]
    assert [each["advantage"] for each in second][:2] == [None, None]
    assert second[2]["advantage"] == found.advantages_J[2]
    json.dumps(group, allow_nan=False)
    (run.path / "measured/step-000001/segments.parquet").write_bytes(b"torn")
    torn = data.group(group_id)
    assert torn is not None and "cannot be read, so no value is shown" in torn["note"]
    assert all(each["measured"] is None for each in torn["completions"])


def same_float32(shown: list[float | None] | None, logged: list[float] | None) -> bool:
    """The same float32 values; null where not finite; and no digit too many."""
    if shown is None or logged is None:
        return shown is logged
    return len(shown) == len(logged) and all(
        not math.isfinite(b) if a is None else np.float32(a) == np.float32(b) and len(f"{a}") <= 15
        for a, b in zip(shown, logged, strict=True)
    )


def test_a_live_run_is_followed_without_reading_what_was_read(tmp_path: Path) -> None:
    run = SyntheticRun(tmp_path / "live", segment_bytes=6_000)
    data = RunData(run.path)
    assert data.page(GroupQuery())["total"] == 0
    assert data.facts()["notes"]
    seen: list[int] = []
    for group_id in range(12):
        version = data.refresh().version
        assert data.refresh().version == version  # nothing changed
        run.group(group_id, f"P{group_id}", [Sample("one", 1.0), Sample("two")])
        if group_id % 3 == 2:
            run.step(group_id // 3 + 1, [group_id - 2, group_id - 1])
        assert data.refresh().version != version
        seen.append(group_id)
        rows = data.page(GroupQuery())["rows"]
        assert [row["group"] for row in rows] == seen
        found = data.page(GroupQuery(text=f"p{group_id}"))["rows"]
        assert group_id in [row["group"] for row in found]
        assert len(data.group(group_id)["completions"]) == 2  # type: ignore[index]
    states = {row["group"]: row["state"] for row in data.page(GroupQuery())["rows"]}
    assert states == {g: "verified" if g % 3 == 2 else "trained" for g in range(12)}
    run.close()
    data.refresh()
    fresh = RunData(run.path).page(GroupQuery())["rows"]
    assert data.page(GroupQuery())["rows"] == fresh  # through Arrow as through Parquet
    assert any(segment._has_twin for segment in data._log.segments)


def test_a_torn_tail_is_no_group_until_it_is_whole(tmp_path: Path) -> None:
    run = SyntheticRun(tmp_path / "whole")
    for group_id in range(3):
        run.group(group_id, "P", [Sample("one", 1.0)])
    whole = segments(run.path / "trajectories")[0].read_bytes()
    torn = tmp_path / "torn"
    shutil.copytree(run.path, torn)
    path = segments(torn / "trajectories")[0]
    path.write_bytes(whole[:-100])
    data = RunData(torn)
    logged = [row["group"] for row in data.page(GroupQuery())["rows"] if row["logged"]]
    assert logged == [0, 1]
    assert data.group(2)["note"].startswith("the trajectory log does not have")  # type: ignore[index]
    path.write_bytes(whole)
    data.refresh()
    assert data.group(2)["completions"][0]["text"] == "one"  # type: ignore[index]


def test_a_segment_that_lost_groups_of_its_index_says_so(tmp_path: Path) -> None:
    run = SyntheticRun(tmp_path / "run")
    for group_id in range(3):
        run.group(group_id, "P", [Sample("one", 1.0)])
    run.close()
    path = segments(run.path / "trajectories")[0]
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(RunError, match="is damaged"):
        RunData(run.path).group(2)


def test_a_search_is_cut_into_requests(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deploy.inspector.run_data.SEARCH_S", 0.0)
    data = RunData(finished)
    shares, totals = [], []
    while not shares or shares[-1] < 1:
        answer = data.page(GroupQuery(text="word"))
        shares.append(answer["searched"])
        totals.append(answer["total"])
    assert len(shares) == len(segments(finished / "trajectories"))
    assert shares == sorted(set(shares)) and totals == sorted(totals)
    assert totals[-1] == sum(
        any("word" in text for text in row["texts"]) for row in brute_forced(finished).values()
    )


def test_runs_without_a_part_say_which(tmp_path: Path, finished: Path) -> None:
    with pytest.raises(UserError, match="there is no run"):
        RunData(tmp_path)
    bare = tmp_path / "bare"
    shutil.copytree(finished, bare)
    for gone in ("credit", "checkpoints"):
        shutil.rmtree(bare / gone)
    for gone in bare.glob("ledger*"):
        gone.unlink()
    (bare / "metrics.jsonl").unlink()
    data = RunData(bare)
    notes = " ".join(data.facts()["notes"])
    for part in ("tokenizer.json", "no ledger", "no metrics", "No step has credit"):
        assert part in notes
    row = data.page(GroupQuery())["rows"][0]
    assert (row["step"], row["length"], row["state"]) == (None, None, None)
    shown = data.group(0)
    assert shown is not None and shown["completions"][0]["tokens"]["text"] is None


def test_a_credit_log_of_another_run_is_refused(tmp_path: Path) -> None:
    long, short = sums_run(tmp_path / "a", 1, 1, 2), SyntheticRun(tmp_path / "b")
    short.group(0, "P", [Sample("12"), Sample("7", 1.0)])
    short.step(1, [0])
    shutil.copy(credit_path(long.path, 1), credit_path(short.path, 1))
    with pytest.raises(UserError, match="not that of this trajectory log"):
        RunData(short.path).group(0)


@example("\ufffd")
@example("a\ufffd\ufffd\u20ac")
@given(st.text(max_size=30))
@settings(max_examples=200, deadline=None)
def test_texts_of_tokens_add_up_to_the_text(text: str) -> None:
    tokenizer = build_tokenizer()
    texts = TokenTexts(tokenizer.backend_tokenizer).texts(tokenizer.encode(text))
    assert "".join(texts) == text
    assert REPLACEMENT in text or REPLACEMENT not in "".join(texts)


@given(st.lists(st.integers(0, 300), max_size=40))
@settings(max_examples=200, deadline=None)
def test_any_tokens_have_texts_and_as_many(ids: list[int]) -> None:
    texts = TokenTexts(build_tokenizer().backend_tokenizer).texts(ids)
    assert len(texts) == len(ids)
    assert all("⟨" in text for token, text in zip(ids, texts, strict=True) if token > 258)
    json.dumps(texts).encode()  # no half of a character


def test_the_newest_checkpoint_has_the_tokenizer(tmp_path: Path) -> None:
    assert load_tokenizer(tmp_path, "builtin:nothing")[0] is None
    for step in (9, 10):
        build_tokenizer().save_pretrained(tmp_path / "checkpoints" / f"step-{step}")
    assert "step-10/" in load_tokenizer(tmp_path, "builtin:nothing")[1]
    (tmp_path / "checkpoints/step-10/tokenizer.json").write_text("{")
    texts, reason = load_tokenizer(tmp_path, "builtin:nothing")
    assert texts is None and "cannot be read" in reason


def test_a_sample_is_bounded_and_says_what_it_lacks(finished: Path) -> None:
    data = RunData(finished)
    some = sample(data, steps=2, groups=100)
    # Steps 5 and 6, and the group that no step has: it was dispatched at version 6.
    assert [row["group"] for row in some["rows"]] == [*range(29, 19, -1), 30]
    assert [group["group"] for group in some["details"]] == [row["group"] for row in some["rows"]]
    assert "11 of 31 groups" in some["facts"]["notes"][0]
    few = sample(data, steps=6, groups=3)
    assert [row["group"] for row in few["rows"]] == [29, 28, 27]


def test_embedded_json_has_no_markup() -> None:
    value = {"</script><!--": ["<img onerror=alert(1)>", "&amp;", "\u2028é"]}
    text = as_inert_json(value)
    assert not set(text) & set("<>&\u2028") and text.isascii()
    assert json.loads(text) == value
    with pytest.raises(ValueError, match="JSON"):
        as_inert_json(math.nan)


def test_the_bundle_has_every_module_once_and_no_import() -> None:
    text = bundle("main.js")
    assert "\nimport " not in text and "\nexport " not in text
    for mark in ("function shade(", "class ServerSource", "function drawChart(", "buildTable();"):
        assert text.count(mark) == 1, mark
