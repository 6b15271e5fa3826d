"""The credit log: what was written is read back to the bit, whole or not at all."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.ipc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import UserError
from common.record.credit_log import (
    VERSION_KEY,
    credit_path,
    credit_schema,
    credit_steps,
    forget_credit_after,
    read_credit,
    read_group_credit,
    write_credit,
)

FLOATS = st.floats(width=32, allow_infinity=False)


@st.composite
def completions(draw: st.DrawFn, step: int) -> list[dict[str, Any]]:
    """Rows of one step: groups in any order, some of their rows apart, some without lists."""
    rows = []
    for group_id in draw(st.lists(st.integers(0, 4), max_size=8)):
        length = draw(st.integers(0, 4))
        lists = {
            name: draw(st.lists(FLOATS, min_size=length, max_size=length))
            for name in ("trace_weights", "advantages", "logprobs")
        }
        trained = draw(st.booleans())
        rows.append(
            {
                "step": step,
                "group_id": group_id,
                "ticket": group_id + 7,
                "completion_index": sum(row["group_id"] == group_id for row in rows),
                "reward": draw(st.none() | FLOATS.filter(math.isfinite)),
                "advantage": draw(st.floats(allow_nan=False)),
                "token_weight": draw(st.floats(0, 1)),
                "trained": trained,
                **(lists if trained else dict.fromkeys(lists)),
            }
        )
    return rows


def batch_of(rows: list[dict[str, Any]]) -> pa.RecordBatch:
    return pa.RecordBatch.from_pylist(rows, schema=credit_schema())


def same(a: Any, b: Any) -> bool:
    """Equal, NaN to NaN included."""
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b or (isinstance(a, float) and isinstance(b, float) and a != a and b != b)


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_rows_come_back_in_their_order_and_group_by_group(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    run = tmp_path_factory.mktemp("run")
    rows = data.draw(completions(12))
    write_credit(run, 12, batch_of(rows))
    assert credit_path(run, 12) == run / "credit" / "step-000012.arrow"
    found = read_credit(run, 12).to_pylist()
    assert len(found) == len(rows)
    for before, after in zip(rows, found, strict=True):
        assert all(same(before[name], after[name]) for name in before), (before, after)
    for group_id in range(5):
        mine = [row for row in rows if row["group_id"] == group_id]
        indices = [row["completion_index"] for row in mine]
        got = read_group_credit(run, 12, group_id).to_pylist()
        assert [row["completion_index"] for row in got] == indices
        assert all(same(a["logprobs"], b["logprobs"]) for a, b in zip(mine, got, strict=True))


_ROW = {
    "step": 3,
    "group_id": 1,
    "ticket": 1,
    "completion_index": 0,
    "reward": 1.0,
    "advantage": 0.5,
    "token_weight": 0.1,
    "trained": False,
}


def test_a_step_is_replaced_and_half_written_files_are_no_steps(tmp_path: Path) -> None:
    assert credit_steps(tmp_path) == []
    row = dict(_ROW)
    write_credit(tmp_path, 3, batch_of([row]))
    write_credit(tmp_path, 3, batch_of([row | {"advantage": -0.5}]))
    write_credit(tmp_path, 1_000_000, batch_of([row | {"step": 1_000_000}]))
    (tmp_path / "credit" / "step-000004.arrow.partial").write_bytes(b"half")
    assert credit_steps(tmp_path) == [3, 1_000_000]
    assert read_credit(tmp_path, 3)["advantage"].to_pylist() == [-0.5]


def test_another_rule_has_a_file_of_its_own_and_a_resume_takes_both_back(tmp_path: Path) -> None:
    row = dict(_ROW)
    for step in (3, 12):
        write_credit(tmp_path, step, batch_of([row | {"step": step}]))
        write_credit(tmp_path, step, batch_of([row | {"step": step, "advantage": 2.0}]), "dapo")
    assert credit_steps(tmp_path) == [3, 12]
    assert read_credit(tmp_path, 3)["advantage"].to_pylist() == [0.5]
    assert read_credit(tmp_path, 3, "dapo")["advantage"].to_pylist() == [2.0]
    forget_credit_after(tmp_path, 3)
    names = sorted(path.name for path in (tmp_path / "credit").iterdir())
    assert names == ["step-000003.arrow", "step-000003.dapo.arrow"]


def test_what_cannot_be_true_is_refused(tmp_path: Path) -> None:
    row = {
        "step": 3,
        "group_id": 1,
        "ticket": 1,
        "completion_index": 0,
        "advantage": 0.5,
        "token_weight": 0.1,
        "trained": True,
        "trace_weights": [1.0],
        "advantages": [0.5],
        "logprobs": [-1.0],
    }
    for wrong, message in (
        (row | {"step": 4}, "other steps"),
        (row | {"logprobs": [-1.0, -2.0]}, "unequal lengths"),
        (row | {"advantages": None}, "unequal lengths"),
    ):
        with pytest.raises(ValueError, match=message):
            write_credit(tmp_path, 3, batch_of([wrong]))
    with pytest.raises(ValueError, match="not the schema"):
        write_credit(tmp_path, 3, batch_of([row]).drop_columns(["ticket"]))
    assert credit_steps(tmp_path) == []


def test_a_log_of_before_there_were_values_is_read_with_none(tmp_path: Path) -> None:
    rows = [_ROW | {"completion_index": i, "scores": [-float(i)], "values": [0.5]} for i in (0, 1)]
    write_credit(tmp_path, 3, batch_of(rows))
    newer = read_credit(tmp_path, 3)
    assert newer["values"].to_pylist() == [[0.5], [0.5]]
    older = newer.drop_columns(["values"])
    older = older.replace_schema_metadata({VERSION_KEY: b"3"})
    with pa.ipc.new_file(credit_path(tmp_path, 3), older.schema) as file:
        file.write_table(older)
    for found in (read_credit(tmp_path, 3), read_group_credit(tmp_path, 3, 1)):
        assert found.schema.equals(credit_schema(), check_metadata=True)
        assert found["values"].null_count == 2
        assert found.drop_columns(["values"]).to_pylist() == older.to_pylist()
    assert read_group_credit(tmp_path, 3, 2).num_rows == 0


def test_other_files_are_named_in_the_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="000005.arrow does not exist: this step"):
        read_credit(tmp_path, 5)
    path = credit_path(tmp_path, 5)
    path.parent.mkdir()
    path.write_bytes(b"no arrow at all")
    with pytest.raises(UserError, match="no credit log"):
        read_credit(tmp_path, 5)
    newer = credit_schema().with_metadata({VERSION_KEY: b"99"})
    with pa.ipc.new_file(path, newer):
        pass
    with pytest.raises(UserError, match="version b'99', this release reads 3 and 4"):
        read_group_credit(tmp_path, 5, 1)
