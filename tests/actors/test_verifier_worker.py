"""The verifier worker: it takes rollout batches and gives trajectory batches."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow as pa
import pytest
from turn_columns import answer_columns

from actors.verifiers.registry import verifier_names
from actors.verifiers.worker import VerifierWorker
from common.config.sections import VerifierConfig, VerifierSpec
from common.errors import RunError, UserError
from common.record.schema import rollout_schema, trajectory_schema


def rollout_batch(texts: list[str], answer: str = "3") -> pa.RecordBatch:
    reference = json.dumps({"prompt": "?", "answer": answer, "task": None, "entry": None})
    rows = [
        {
            "group_id": 7,
            "ticket": 7,
            "completion_index": index,
            "prompt_id": "p",
            "epoch": 0,
            "source": "",
            "question": "?",
            "prompt_text": "?",
            "reference": reference,
            "prompt_ids": [1],
            "text": text,
            "token_ids": [5, 6],
            "behaviour_logprobs": [-0.5, -0.25],
            "weight_versions": [3, 3],
            "loss_mask": [True, True],
            "guidance_length": 0,
            "finish_reason": "stop",
            **answer_columns(0, 2),
            "generator": "g0",
            "dispatch_version": 3,
            "dispatched_s": 1.0,
            "finished_s": 2.0,
        }
        for index, text in enumerate(texts)
    ]
    return pa.RecordBatch.from_pylist(rows, schema=rollout_schema())


@contextmanager
def worker_for(*rules: VerifierSpec, timeout_s: float = 1.0) -> Iterator[VerifierWorker]:
    worker = VerifierWorker(VerifierConfig(rules=list(rules), timeout_s=timeout_s))
    try:
        yield worker
    finally:
        worker.close()


HOSTILE = VerifierSpec(name="hostile_verifiers:hostile", weight=2.0)
SHORT = VerifierSpec(name="format_rules", weight=0.5, args={"max_characters": 10})


def test_rewards_verdicts_and_totals() -> None:
    batch = rollout_batch(["number 0.25", "number 0", "loop", "raise", "number 00001"])
    with worker_for(HOSTILE, SHORT) as worker:
        verified, _ = asyncio.run(worker.score_group(batch))
        failures = worker.failures()
    assert verified.schema.equals(trajectory_schema(["hostile", "format_rules"]), True)
    assert verified.select(rollout_schema().names).equals(batch)
    found = {
        name: verified.column(name).to_pylist()
        for name in verified.schema.names[len(batch.schema) :]
    }
    assert found == {
        "reward/hostile": [0.25, 0.0, None, None, 1.0],
        "verdict/hostile": ["pass", "fail", "timeout", "error", "pass"],
        "reward/format_rules": [0.0, 1.0, 1.0, 1.0, 0.0],
        "verdict/format_rules": ["fail", "pass", "pass", "pass", "fail"],
        "reward": [0.5, 0.5, None, None, 2.0],
        "accuracy": [0.25, 0.0, None, None, 1.0],
        "suspicious": [""] * 5,
    }
    assert failures == {
        "hostile: no verdict within 1 s": 1,
        "hostile: KeyError: 'no such key'": 1,
    }


def test_the_total_is_null_when_a_later_rule_cannot_judge() -> None:
    easy = VerifierSpec(name="hostile_verifiers:obedient")
    with worker_for(easy, HOSTILE) as worker:
        verified, _ = asyncio.run(worker.score_group(rollout_batch(["nan"], answer="nan")))
    assert verified.column("reward").to_pylist() == [None]
    assert verified.column("accuracy").to_pylist() == [1.0]


def test_a_total_beyond_float32_is_null_and_not_infinite() -> None:
    heavy = VerifierSpec(name="format_rules", weight=1e39, args={"max_characters": 10})
    with worker_for(heavy) as worker:
        verified, _ = asyncio.run(worker.score_group(rollout_batch(["short", "x" * 11])))
    assert verified.column("reward").to_pylist() == [None, 0.0]


def test_rules_judge_the_data_sets_that_they_name() -> None:
    first = VerifierSpec(name="hostile_verifiers:obedient", sources=["math"])
    second = VerifierSpec(name="choice", weight=3.0, sources=["letters", "more"])
    batch = rollout_batch(["3", "Answer: B", "Answer: C"])
    references = [{"answer": "3", "data_set": "math"}]
    references += [{"answer": "B", "data_set": name} for name in ("letters", "more")]
    place = batch.schema.get_field_index("reference")
    batch = batch.set_column(
        place, batch.schema.field(place), pa.array([json.dumps(one) for one in references])
    )
    with worker_for(first, second, SHORT, timeout_s=10.0) as worker:
        verified, _ = asyncio.run(worker.score_group(batch))
    found = {
        name: verified.column(name).to_pylist()
        for name in verified.schema.names[len(batch.schema) :]
    }
    assert found == {
        "reward/obedient": [1.0, None, None],
        "verdict/obedient": ["pass", "skipped", "skipped"],
        "reward/choice": [None, 1.0, 0.0],
        "verdict/choice": ["skipped", "pass", "fail"],
        "reward/format_rules": [1.0, 1.0, 1.0],
        "verdict/format_rules": ["pass", "pass", "pass"],
        "reward": [1.5, 3.5, 0.5],
        "accuracy": [1.0, 1.0, 0.0],
        "suspicious": [""] * 3,
    }


def test_two_rules_of_one_name() -> None:
    loose = VerifierSpec(name="format_rules", args={"max_characters": 100})
    with worker_for(SHORT, loose) as worker:
        verified, _ = asyncio.run(worker.score_group(rollout_batch(["x" * 50])))
    assert verifier_names(VerifierConfig(rules=[SHORT, loose])) == [
        "format_rules",
        "format_rules_2",
    ]
    assert verified.column("reward/format_rules").to_pylist() == [0.0]
    assert verified.column("reward/format_rules_2").to_pylist() == [1.0]


def test_math_answer_judges_in_the_child() -> None:
    with worker_for(VerifierSpec(name="math_answer"), timeout_s=10.0) as worker:
        batch = rollout_batch([r"\boxed{\frac{6}{2}}", "4"])
        verified, _ = asyncio.run(worker.score_group(batch))
    assert verified.column("verdict/math_answer").to_pylist() == ["pass", "fail"]


def test_the_event_loop_stays_free_and_groups_keep_to_themselves() -> None:
    async def judge_and_tick(worker: VerifierWorker) -> tuple[list[pa.RecordBatch], float]:
        await worker.warm_up()
        batches = [rollout_batch(["sleep 1", f"number {i}"]) for i in range(3)]
        judging = asyncio.gather(*(worker.score_group(batch) for batch in batches))
        longest = 0.0
        while not judging.done():
            start = time.monotonic()
            await asyncio.sleep(0.01)
            longest = max(longest, time.monotonic() - start)
        return [batch for batch, _ in await judging], longest

    with worker_for(HOSTILE, timeout_s=10.0) as worker:
        verified, longest = asyncio.run(judge_and_tick(worker))
    assert longest < 0.8
    assert [v.column("accuracy").to_pylist() for v in verified] == [[1.0, i] for i in range(3)]


def test_rules_that_cannot_be_used_stop_the_warm_up() -> None:
    unusable = VerifierSpec(name="nowhere:score")
    with worker_for(unusable) as worker, pytest.raises(UserError, match="nowhere"):
        asyncio.run(worker.warm_up())


def test_another_batch_is_refused() -> None:
    with worker_for(HOSTILE) as worker, pytest.raises(ValueError, match="rollout"):
        asyncio.run(worker.score_group(pa.RecordBatch.from_pylist([{"text": "x"}])))


def test_closing_ends_the_group_being_judged() -> None:
    async def judge_and_close(worker: VerifierWorker) -> None:
        await worker.warm_up()
        judging = asyncio.create_task(worker.score_group(rollout_batch(["loop"])))
        await asyncio.sleep(0.2)
        worker.close()
        with pytest.raises(RunError, match="closed"):
            await judging

    with worker_for(HOSTILE, timeout_s=60.0) as worker:
        asyncio.run(judge_and_close(worker))


def played(texts: list[str], said: list[tuple[str, str, float | None]]) -> pa.RecordBatch:
    """A batch whose environments said (verdict, reason, reward), one a completion."""
    rows = rollout_batch(texts).to_pylist()
    for row, (verdict, reason, reward) in zip(rows, said, strict=True):
        row["environment_verdict"], row["environment_reason"] = verdict, reason
        row["environment_reward"] = reward
    return pa.RecordBatch.from_pylist(rows, schema=rollout_schema())


SAID = [("pass", "", 0.75), ("fail", "", 0.0), ("error", "it died", None), ("timeout", "", None)]


def test_the_environments_reward_is_a_rule_beside_others() -> None:
    environment = VerifierSpec(name="environment", weight=2.0)
    batch = played(["short", "x" * 11, "short", "short"], SAID)
    with worker_for(environment, SHORT) as worker:
        verified, _ = asyncio.run(worker.score_group(batch))
        failures = worker.failures()
    found = {name: verified.column(name).to_pylist() for name in verified.schema.names[-7:]}
    assert found == {
        "reward/environment": [0.75, 0.0, None, None],
        "verdict/environment": ["pass", "fail", "error", "timeout"],
        "reward/format_rules": [1.0, 0.0, None, None],
        "verdict/format_rules": ["pass", "fail", "error", "timeout"],
        "reward": [2.0, 0.0, None, None],
        "accuracy": [0.75, 0.0, None, None],
        "suspicious": [""] * 4,
    }
    assert failures["it died"] == 2


def test_the_environment_alone_judges_without_a_child() -> None:
    with worker_for(VerifierSpec(name="environment")) as worker:
        asyncio.run(worker.warm_up())
        batch = played(["a", "b", "c"], [("", "", None), ("pass", "", 1.0), ("fail", "", 1e39)])
        verified, _ = asyncio.run(worker.score_group(batch))
        reasons = worker.failures()
    assert verified.column("reward").to_pylist() == [None, 1.0, None]
    assert set(reasons) == {"the environment gave no reward", "the environment gave inf as reward"}


def test_rules_judge_what_an_environment_left_to_them() -> None:
    with worker_for(SHORT) as worker:
        verified, _ = asyncio.run(
            worker.score_group(played(["short", "short"], [("", "", None), SAID[2]]))
        )
    assert verified.column("reward").to_pylist() == [0.5, None]
