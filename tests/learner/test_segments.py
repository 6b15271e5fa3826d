"""Episodes of several conversations: each trains behind its own prompt, the episode counts once."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from learner_models import VOCABULARY, save_tiny_model, tiny_model, trajectories
from learner_ranks import (
    SHAPES,
    assert_same_training,
    make_worker,
    moments,
    on_ranks,
    weights,
    worker,
)

from common.config.algorithm import AlgorithmConfig
from common.record.credit_log import read_credit
from common.record.segments import segment
from common.record.turns import turn
from learner.policy.packing import plan_packing
from learner.policy.step_batch import StepBatch
from learner.training.work import step_rewards

Row = dict[str, Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


def changed(groups: list[pa.RecordBatch], change: Any) -> list[pa.RecordBatch]:
    """`groups` after `change` of every row, which is told how far it is in the step."""
    found, count = [], 0
    for group in groups:
        rows = group.to_pylist()
        for row in rows:
            change(row, count)
            count += 1
        found.append(pa.RecordBatch.from_pylist(rows, schema=group.schema))
    return found


def in_turns(row: Row, count: int) -> None:
    """Every other episode of three tokens or more has two turns."""
    length = len(row["token_ids"])
    if count % 2 and length > 2:
        place = 1 + count % (length - 1)
        row["turns"] = [turn(0, place, "stop"), turn(place, length, "stop")]


def in_segments(row: Row, count: int) -> None:
    """A segment for each turn, whose prompt is all that was before it: the same conversation."""
    in_turns(row, count)
    if len(row["turns"]) > 1:
        row["segments"] = [
            segment(
                each["begin"], each["end"], row["prompt_ids"] + row["token_ids"][: each["begin"]]
            )
            for each in row["turns"]
        ]


def of_its_own(row: Row, count: int) -> None:
    """Two of three episodes consist of conversations that begin in other ways than the question."""
    length = len(row["token_ids"])
    if count % 3:
        random = np.random.default_rng(count)
        places = [0, *range(2, length, 4), length]
        pairs = [pair for pair in pairwise(places) if pair[0] < pair[1]]
        row["segments"] = [
            segment(begin, end, random.integers(3, VOCABULARY, 2 + count % 5).tolist())
            for begin, end in pairs
        ]


def trained(folder: Path, groups: list[pa.RecordBatch], **changes: Any) -> tuple[Any, Any, Any]:
    """As `learner_ranks.train_work`, one step on `groups`."""
    with worker(folder, **changes) as made:
        metrics = [made.step(groups, 0, 0, changes.get("run"))]
        exported = {name: tensor.float().numpy() for name, tensor in weights(made).items()}
        return metrics, exported, moments(made)


def traced(decay: float, turn_decay: float | None) -> AlgorithmConfig:
    algorithm = AlgorithmConfig()
    algorithm.credit.kind, algorithm.credit.lambda_ = "lambda_trace", decay
    algorithm.credit.turn_decay = turn_decay
    return algorithm


@pytest.mark.parametrize(
    ("kind", "packing"),
    [
        ("broadcast", "shared_prefix"),
        ("broadcast", "sequence"),
        ("trace", "shared_prefix"),
        ("kl", "shared_prefix"),
        ("kl in the reward", "shared_prefix"),
    ],
)
def test_an_episode_cut_into_segments_trains_as_the_whole(
    folder: Path, kind: str, packing: str, tmp_path: Path
) -> None:
    """The same tokens behind the same tokens. A trace begins anew, as with a turn decay of 0."""
    changes: dict[str, Any] = {"packing": packing}
    if kind == "trace":
        changes["algorithm"] = traced(0.9, 0.0)
    elif kind != "broadcast":
        changes |= {"kl": 0.01, "kl_in": "reward" if "reward" in kind else "loss"}
    whole = trained(
        folder, changed(trajectories(SHAPES), in_turns), run=str(tmp_path / "whole"), **changes
    )
    cut = trained(
        folder, changed(trajectories(SHAPES), in_segments), run=str(tmp_path / "cut"), **changes
    )
    assert_same_training(cut, whole)
    assert cut[0][0]["tokens/trained"] == whole[0][0]["tokens/trained"]
    logs = [read_credit(tmp_path / name, 1).to_pylist() for name in ("whole", "cut")]
    for one, other in zip(*logs, strict=True):
        for name in ("trace_weights", "advantages", "logprobs"):
            np.testing.assert_allclose(other[name], one[name], rtol=1e-4, atol=1e-5)


def test_a_trace_would_have_gone_on_without_the_cut(folder: Path) -> None:
    """The test above can fail."""
    groups = [changed(trajectories(SHAPES), change) for change in (in_turns, in_segments)]
    norms = [
        trained(folder, group, algorithm=traced(0.9, None))[0][0]["grad_norm"] for group in groups
    ]
    assert norms[0] != pytest.approx(norms[1], rel=1e-2)


def by_hand(groups: list[pa.RecordBatch], made: Any) -> dict[str, torch.Tensor]:
    """Gradient of the loss, conversation by conversation with a plain model."""
    batch = StepBatch.from_record_batches(groups)
    prepared = made.trainer.recipe.prepare(step_rewards(batch, made.trainer.job))
    model = tiny_model("llama_tied")
    rows = [row for group in groups for row in group.to_pylist()]
    for i, row in enumerate(rows):
        length = len(row["token_ids"])
        for each in row["segments"] or [segment(0, length, row["prompt_ids"])]:
            prompt, ids = each["prompt_ids"], row["token_ids"][each["begin"] : each["end"]]
            logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1] / 0.9
            logprobs = logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]
            credit = prepared.advantages_B[i] * prepared.token_weights_B[i]
            (-credit * logprobs.sum()).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("tokens", [32, 4096])
def test_the_gradient_is_that_of_the_conversations_by_hand(folder: Path, tokens: int) -> None:
    groups = changed(trajectories(SHAPES), of_its_own)
    keys = {"correction_kind": "none", "max_grad_norm": 1e9, "tokens_per_microbatch": tokens}
    with worker(folder, **keys) as made:
        expected = by_hand(groups, made)
        metrics = made.step(groups, 0, 0)
        found = moments(made)
    norm = sum(float((gradient.double() ** 2).sum()) for gradient in expected.values()) ** 0.5
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert len(found) == len(expected)
    for name, gradient in expected.items():
        wanted = 0.1 * gradient.numpy()  # AdamW's first moment after one step
        np.testing.assert_allclose(found[name], wanted, atol=1e-4 * np.abs(wanted).max(), rtol=1e-3)


def test_an_episode_weighs_the_same_in_however_many_segments() -> None:
    plain = trajectories(SHAPES)
    batches = [StepBatch.from_record_batches(g) for g in (plain, changed(plain, of_its_own))]
    for name in ("lengths_B", "trained_lengths_B", "rewards_B", "group_B"):
        one, other = (getattr(batch, name) for batch in batches)
        assert np.array_equal(one, other), name


@pytest.mark.parametrize("share", [True, False])
def test_every_segment_is_planned_once_behind_its_own_prompt(share: bool) -> None:
    groups = changed(trajectories(SHAPES), of_its_own)
    batch = StepBatch.from_record_batches(groups)
    trained_B = np.arange(len(batch.group_B)) % 4 > 0
    plan = plan_packing(
        batch, trained_B, ranks=2, budget=48, share_prefix=share, pairs_per_token=384.0
    )
    planned = [s for rank in plan.microbatches for members in rank for s in members]
    sequences = batch.sequences
    wanted = np.flatnonzero(trained_B[sequences.completion_S]).tolist()
    assert sorted(c for s in planned for c in s.completions) == wanted
    assert {int(sequences.prompt_S[c]) == s.prompt for s in planned for c in s.completions} == {
        True
    }
    rows = [row for group in groups for row in group.to_pylist()]
    for sequence, completion in enumerate(sequences.completion_S.tolist()):
        row = rows[completion]
        first = int(sequences.offsets[sequence] - batch.offsets[completion])
        starts = {each["begin"]: each["prompt_ids"] for each in row["segments"]}
        prompt = batch.prompts[sequences.prompt_S[sequence]].tolist()
        assert prompt == (starts[first] if row["segments"] else row["prompt_ids"])


def test_segments_behind_one_prompt_share_it() -> None:
    def same(row: Row, count: int) -> None:
        length = len(row["token_ids"])
        row["segments"] = [segment(0, 1, [5, 6]), segment(1, length, [5, 6])]

    batch = StepBatch.from_record_batches(changed(trajectories([(3, [4, 4]), (3, [4])]), same))
    assert batch.sequences.prompt_S.tolist() == [2, 2, 2, 2, 3, 3]  # a group keeps to itself
    assert batch.prompt_tokens == 4


class _Step:
    def __call__(self, made: Any) -> Any:
        metrics = [made.step(changed(trajectories(SHAPES), of_its_own), 0, 0)]
        exported = {name: tensor.float().numpy() for name, tensor in weights(made).items()}
        return metrics, exported, moments(made)


def _target(rank: int, ranks: int, folder: Path) -> tuple[Any, Any]:
    return make_worker(folder, rank, ranks), _Step()


def test_two_ranks_share_the_segments_of_an_episode(folder: Path) -> None:
    alone = trained(folder, changed(trajectories(SHAPES), of_its_own))
    assert_same_training(on_ranks(2, _target, folder)[0], alone)
