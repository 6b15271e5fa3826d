"""Run directories for the inspector's tests and its benchmark, made without a run.

`sums_run`    a few steps of sums worked out or blurted, with credit, ledger, metrics and tokenizer
`large_run`   very many small completions in real segments, to measure opening
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from turn_columns import answer_columns, listed_answers

from common.record.credit_log import credit_schema, write_credit
from common.record.ledger import Ledger
from common.record.metrics import JsonlSink
from common.record.schema import FAIL, PASS, trajectory_schema
from common.record.segments import segment
from common.record.trajectory_log import SEGMENT_BYTES, TrajectoryLog
from common.record.turns import sampled_lengths, turn
from common.trajectory import GroupReceipt, GroupRequest
from deploy.models.tiny_model import build_tokenizer
from deploy.run.directory import LEDGER

VERIFIER = "math_answer"
SCHEMA = trajectory_schema([VERIFIER])
TEMPLATE = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
"""Around a question, as chat models have it."""
SCORED_STEP = 3
"""The step that a scorer and a critic have numbers of."""
CONFIG = """\
name: {name}
recipe: grpo_lambda_recent
steps: 30
model:
  path: builtin:not-there
generator:
  max_staleness: 1
"""


@dataclass
class Sample:
    """One completion as a test wants it; what is not said is derived from the text."""

    text: str
    reward: float | None = 0.0
    guidance: int = 0
    finish: str = "stop"
    verdict: str = ""
    versions: tuple[int, int] = (0, 0)
    """Of the first and of the second half of its tokens."""
    ids: list[int] = field(default_factory=list)
    turns: list[tuple[int, int, float | None]] = field(default_factory=list)
    """Begin, end and reward of each turn; empty: all that is no guidance is one turn."""
    segments: Sequence[tuple[int, int, str]] = ()
    """Begin, end and prompt of each conversation; empty: one, behind the question."""
    calls: tuple[int, int] = (0, 0)
    """Tool calls of the first turn, and how many of them failed."""
    failure: str = ""
    """Of the environment: `error` or `timeout`."""


class SyntheticRun:
    """Writes a run directory as the parts of a run would, group by group and step by step."""

    def __init__(
        self,
        path: Path,
        seed: int = 0,
        segment_bytes: int = SEGMENT_BYTES,
        tokens: Sequence[str] = (),
    ) -> None:
        """`tokens`: texts that are a token each, beside the bytes."""
        self.path = path
        path.mkdir(parents=True)
        (path / "config.yaml").write_text(CONFIG.format(name=path.name))
        self.tokenizer = build_tokenizer()
        self.tokenizer.add_tokens(list(tokens))
        self.tokenizer.save_pretrained(path / "checkpoints" / "step-0")
        self.log = TrajectoryLog(path / "trajectories", SCHEMA, segment_bytes)
        self.ledger = Ledger(path / LEDGER, "synthetic")
        self.metrics = JsonlSink(path / "metrics.jsonl")
        self.random = np.random.default_rng(seed)
        self.groups: dict[int, pa.RecordBatch] = {}

    def group(
        self, group_id: int, question: str, samples: Sequence[Sample], version: int = 0
    ) -> int:
        """Dispatch, log and book one group; its sampled tokens."""
        rows = [self._row(group_id, index, question, s, version) for index, s in enumerate(samples)]
        batch = pa.RecordBatch.from_pylist(rows, schema=SCHEMA)
        tokens = int(sampled_lengths(batch).sum())
        self.ledger.dispatched(
            GroupRequest(
                group_id, group_id, f"p{group_id}", 0, question, TEMPLATE.format(question), [1],
                "{}", len(rows), 64, 1.0, version, 0.0,
            )
        )  # fmt: skip
        self.log.append(batch)
        self.ledger.verified(group_id, tokens)
        self.groups[group_id] = batch
        return tokens

    def _row(
        self, group_id: int, index: int, question: str, sample: Sample, version: int
    ) -> dict[str, Any]:
        ids = sample.ids or self.tokenizer.encode(sample.text)
        if sample.finish == "stop" and not sample.ids:
            ids = [*ids, self.tokenizer.eos_token_id]
        logprobs = -self.random.exponential(0.4, len(ids))
        logprobs[: sample.guidance] = np.nan
        turns = [turn(begin, end, "stop", reward) for begin, end, reward in sample.turns]
        if sample.turns:
            turns[0]["calls"], turns[0]["failed"] = sample.calls
            in_turn = [any(b <= i < e for b, e, _ in sample.turns) for i in range(len(ids))]
            logprobs[~np.array(in_turn)] = np.nan
        half = len(ids) // 2
        verdict = sample.verdict or (PASS if sample.reward else FAIL)
        first, second = sample.versions
        return {
            "group_id": group_id,
            "ticket": group_id,
            "completion_index": index,
            "prompt_id": f"p{group_id}",
            "epoch": 0,
            "source": "",
            "question": question,
            "prompt_text": TEMPLATE.format(question),
            "reference": json.dumps({"answer": "42"}),
            "prompt_ids": self.tokenizer.encode(TEMPLATE.format(question)),
            "text": sample.text,
            "token_ids": ids,
            "behaviour_logprobs": logprobs,
            "weight_versions": [first] * half + [second] * (len(ids) - half),
            "loss_mask": (~np.isnan(logprobs)).tolist(),
            "guidance_length": sample.guidance,
            "finish_reason": sample.finish,
            **answer_columns(sample.guidance, len(ids), sample.finish),
            **({"turns": turns, "environment_s": 0.5} if sample.turns else {}),
            "segments": [
                segment(begin, end, self.tokenizer.encode(prompt))
                for begin, end, prompt in sample.segments
            ],
            **({"environment_verdict": sample.failure} if sample.failure else {}),
            "generator": f"generator-{index % 2}",
            "dispatch_version": version,
            "dispatched_s": 1.7e9 + group_id,
            "finished_s": 1.7e9 + group_id + 1.5,
            f"reward/{VERIFIER}": sample.reward,
            f"verdict/{VERIFIER}": verdict,
            "reward": sample.reward,
            "accuracy": sample.reward,
            "suspicious": "",
        }

    def step(self, step: int, group_ids: Sequence[int], credit: bool = True) -> None:
        """Train on groups: the ledger, the metrics and, if wanted, the credit log."""
        self.ledger.trained(step, [self._receipt(group_id) for group_id in group_ids])
        rewards = [r for g in group_ids for r in self.groups[g].column("reward").to_pylist()]
        lengths = [
            len(t) for g in group_ids for t in self.groups[g].column("token_ids").to_pylist()
        ]
        scored = [r for r in rewards if r is not None]
        self.metrics.write(
            step,
            {
                "reward/mean": float(np.mean(scored)),
                "reward/accuracy": float(np.mean(scored)),
                "completion_length/mean": float(np.mean(lengths)),
                "staleness/mean": float(min(step - 1, 1)),
                "logprob_gap/mean": 0.012 + 0.003 * float(self.random.random()),
                "grad_norm": 0.8 + 0.4 * float(self.random.random()),
                "guidance/length": float(max(0, 12 - step)),
                "lambda_grpo/preference": float(np.tanh(step / 10)),
                "loss/kl": float("nan") if step == 3 else 0.01 * step,
            },
        )
        if credit:
            write_credit(self.path, step, self._credit(step, group_ids))

    def _receipt(self, group_id: int) -> GroupReceipt:
        batch = self.groups[group_id]
        rewards = batch.column("reward").to_pylist()
        sizes = sampled_lengths(batch).tolist()
        unscored = [size for size, reward in zip(sizes, rewards, strict=True) if reward is None]
        return GroupReceipt(
            group_id, group_id, None, 0, 0, 0, len(sizes), sum(sizes), 0.0, False,
            len(unscored), sum(unscored), 1.0,
        )  # fmt: skip

    def _credit(self, step: int, group_ids: Sequence[int]) -> pa.RecordBatch:
        """GRPO-λ's recent traces, decay 0.9, over the tokens in the loss."""
        rows = []
        for group_id in group_ids:
            batch = self.groups[group_id]
            scored = [r for r in batch.column("reward").to_pylist() if r is not None]
            mean, std = float(np.mean(scored)), float(np.std(scored)) + 1e-8
            for row in batch.to_pylist():
                counts = row["reward"] is not None
                rows.append(self._credit_row(step, row, counts, mean, std))
        return pa.RecordBatch.from_pylist(rows, schema=credit_schema())

    def _credit_row(
        self, step: int, row: dict[str, list[float]], counts: bool, mean: float, std: float
    ) -> dict[str, object]:
        advantage = (row["reward"] - mean) / std if counts else 0.0  # type: ignore[operator]
        lists: dict[str, object] = dict.fromkeys(("trace_weights", "advantages", "logprobs"))
        if counts:
            mask = np.array(row["loss_mask"])
            after = np.cumsum(mask[::-1])[::-1]  # tokens in the loss from here on
            weights = np.where(mask, (1 - 0.9**after) / (1 - 0.9), np.nan)
            behaviour = np.array(row["behaviour_logprobs"])
            learner = np.nan_to_num(behaviour, nan=-1.0) + self.random.normal(0, 0.05, len(mask))
            lists = {
                "trace_weights": weights,
                "advantages": weights * advantage,
                "logprobs": learner,
            }
            if step == SCORED_STEP:
                lists |= {"scores": behaviour - 0.25 * weights, "values": weights / 16}
        return {
            "step": step,
            "group_id": row["group_id"],
            "ticket": row["ticket"],
            "completion_index": row["completion_index"],
            "reward": row["reward"],
            "advantage": advantage,
            "token_weight": 1 / 64,
            "trained": counts,
            **lists,
        }

    def close(self) -> None:
        self.log.close()
        self.ledger.end()
        self.metrics.close()


def worked_sample(
    random: np.random.Generator, terms: Sequence[int], skill: float, versions: tuple[int, int]
) -> Sample:
    """A sum worked out or blurted, right more often when it was worked out."""
    total, parts, running = sum(terms), [], terms[0]
    for term in terms[1:]:
        parts.append(f"{running} + {term} = {running + term}")
        running += term
    if random.random() < skill:
        slip = 0 if random.random() < 0.85 else int(random.integers(1, 4))
        return Sample(
            "; ".join(parts) + f".\nSo the answer is {total + slip}.",
            float(slip == 0), versions=versions,
        )  # fmt: skip
    guess = total + int(random.integers(-3, 4))
    return Sample(f"I think it is {guess}.", float(guess == total), versions=versions)


def sums_run(
    path: Path, steps: int = 12, per_step: int = 4, size: int = 8, tokens: Sequence[str] = ()
) -> SyntheticRun:
    """A whole small run; the last group of it is verified and not trained on."""
    run = SyntheticRun(path, tokens=tokens)
    run.metrics.write(0, {"eval/accuracy": 0.41})
    group_id = 0
    for step in range(1, steps + 1):
        ids = []
        for _ in range(per_step):
            terms = run.random.integers(2, 60, 4).tolist()
            version = max(0, step - 1 - int(run.random.random() < 0.6))
            samples = [
                worked_sample(run.random, terms, 0.3 + 0.5 * step / steps, (version, step - 1))
                for _ in range(size)
            ]
            run.group(group_id, f"What is {' + '.join(map(str, terms))}?", samples, version)
            ids.append(group_id)
            group_id += 1
        run.step(step, ids)
    run.group(group_id, "What is 1 + 1?", [Sample("2", 1.0), Sample("3")], steps - 1)
    return run


def large_run(path: Path, groups: int, size: int = 8, tokens: int = 16) -> None:
    """`groups` groups of `size` completions of about `tokens` tokens, booked in the ledger."""
    random = np.random.default_rng(0)
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(CONFIG.format(name=path.name))
    log = TrajectoryLog(path / "trajectories", SCHEMA)
    block = 5000
    for first in range(0, groups, block):
        count = min(block, groups - first)
        table = _many_rows(random, first, count, size, tokens)
        for index in range(count):
            log.append(table.slice(index * size, size))
    log.close()
    _many_booked(path, groups, size, tokens)


def _many_rows(
    random: np.random.Generator, first: int, groups: int, size: int, tokens: int
) -> pa.RecordBatch:
    rows = groups * size
    ids = np.repeat(np.arange(first, first + groups), size)
    lengths = random.integers(tokens // 2, tokens * 3 // 2 + 1, rows)
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
    total = int(lengths.sum())
    version = ids // 64
    rewards = (random.random(rows) < 0.5).astype(np.float32)

    def listed(values: np.ndarray, kind: pa.DataType) -> pa.Array:
        return pa.ListArray.from_arrays(offsets, pa.array(values, kind))

    questions = [f"What is {i} + {i * 7 % 1000}?" for i in range(first, first + groups)]
    ones = pa.ListArray.from_arrays(
        pa.array(np.arange(rows + 1) * 8, pa.int32()), pa.array(np.ones(rows * 8), pa.int32())
    )
    columns = {
        "group_id": ids,
        "ticket": ids,
        "completion_index": np.tile(np.arange(size), groups),
        "prompt_id": np.repeat([f"p{i % 8000}" for i in range(first, first + groups)], size),
        "epoch": ids // 8000,
        "source": [""] * rows,
        "question": np.repeat(questions, size),
        "prompt_text": np.repeat([TEMPLATE.format(question) for question in questions], size),
        "reference": ['{"answer": "42"}'] * rows,
        "prompt_ids": ones,
        "text": [f"It is {value}." for value in random.integers(0, 100_000, rows)],
        "token_ids": listed(random.integers(0, 32_000, total), pa.int32()),
        "behaviour_logprobs": listed(-random.exponential(0.4, total), pa.float32()),
        "weight_versions": listed(np.repeat(version, lengths), pa.int32()),
        "loss_mask": listed(np.ones(total, bool), pa.bool_()),
        "guidance_length": np.zeros(rows),
        "finish_reason": ["stop"] * rows,
        **listed_answers(lengths.tolist()),
        "generator": ["generator-0"] * rows,
        "dispatch_version": version,
        "dispatched_s": 1.7e9 + ids,
        "finished_s": 1.7e9 + ids + 1.0,
        f"reward/{VERIFIER}": rewards,
        f"verdict/{VERIFIER}": np.where(rewards > 0, PASS, FAIL).tolist(),
        "reward": rewards,
        "accuracy": rewards,
        "suspicious": [""] * rows,
    }
    arrays = [
        column if isinstance(column, pa.Array) else pa.array(column).cast(SCHEMA.field(name).type)
        for name, column in columns.items()
    ]
    return pa.RecordBatch.from_arrays(arrays, schema=SCHEMA)


def _many_booked(path: Path, groups: int, size: int, tokens: int) -> None:
    """The ledger in one transaction: a commit a group would take minutes."""
    import sqlite3

    Ledger(path / LEDGER, "synthetic").end()
    with sqlite3.connect(path / LEDGER) as db:
        db.executemany(
            "INSERT INTO groups VALUES (?, ?, ?, ?, ?, 'closed', ?, ?, 0, '')",
            (
                (i, i, f"p{i % 8000}", size, i // 64, size * tokens, i // 64 + 1)
                for i in range(groups)
            ),
        )
        db.executemany(
            "INSERT INTO outcomes VALUES (?, 'trained', ?, ?)",
            ((i, size, size * tokens) for i in range(groups)),
        )
    db.close()
