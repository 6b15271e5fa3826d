"""What the credit log holds, against a second computation by plain transformers and loops."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from learner_models import save_tiny_model, trajectories
from learner_ranks import make_worker, on_ranks, untimed, worker
from transformers import AutoModelForCausalLM

from common.config.algorithm import AlgorithmConfig, CreditConfig
from common.errors import RunError
from common.record.credit_log import credit_steps, read_credit
from learner.training.rank import LearnerRank

SHAPES = [(9, [5, 12, 3, 7]), (4, [20, 2]), (6, [4, 4, 6])]
REWARDS = [[1.0, 0.0, 0.5, None], [0.0, 1.0], [1.0, 1.0, 1.0]]
DECAY = 0.9
ALGORITHM = AlgorithmConfig(
    credit=CreditConfig(kind="lambda_trace", trace="recent", gamma=1.0, lambda_=DECAY)
)


def guided_groups() -> list[pa.RecordBatch]:
    """The first two tokens of the second completion were given, not sampled."""
    groups = trajectories(SHAPES, rewards=REWARDS)
    columns = groups[0].to_pydict()
    columns["loss_mask"][1][:2] = [False, False]
    columns["behaviour_logprobs"][1][:2] = [float("nan")] * 2
    groups[0] = pa.RecordBatch.from_pydict(columns, schema=groups[0].schema)
    return groups


class _LogWork:
    def __init__(self, run: Path) -> None:
        self.run = run

    def __call__(self, made: LearnerRank) -> dict[str, float]:
        return made.step(guided_groups(), 0, 0, str(self.run))


def _log_target(rank: int, ranks: int, folder: Path, run: Path) -> tuple:
    return make_worker(folder, rank, ranks, algorithm=ALGORITHM), _LogWork(run)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def logged(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    run = tmp_path_factory.mktemp("run")
    with worker(folder, algorithm=ALGORITHM, tokens_per_microbatch=32) as made:
        return run, _LogWork(run)(made)


def token_logprobs(folder: Path, prompt: list[int], tokens: list[int]) -> np.ndarray:
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        logits = model(torch.tensor([prompt + tokens])).logits[0].float() / 0.9
    rows = logits.log_softmax(-1)[len(prompt) - 1 : -1]
    return rows[range(len(tokens)), tokens].numpy()


def test_every_number_is_that_of_a_second_computation(folder: Path, logged) -> None:
    rows = read_credit(logged[0], 1).to_pylist()
    completions = [row for group in guided_groups() for row in group.to_pylist()]
    assert len(rows) == len(completions)
    for row, completion in zip(rows, completions, strict=True):
        for name in ("group_id", "ticket", "completion_index", "reward"):
            assert row[name] == completion[name]
        scores = np.array([r for r in REWARDS[row["group_id"]] if r is not None])
        expected = 0.0
        if row["reward"] is not None and scores.std() > 0:
            expected = (row["reward"] - scores.mean()) / scores.std(ddof=1)
        assert row["advantage"] == pytest.approx(expected, rel=1e-3)
        assert row["trained"] == (row["advantage"] != 0)
        if not row["trained"]:
            assert row["logprobs"] is row["advantages"] is row["trace_weights"] is None
            continue
        tokens, mask = completion["token_ids"], np.array(completion["loss_mask"])
        places = np.flatnonzero(mask).tolist()
        credit = np.full(len(tokens), np.nan)
        for k in places:  # what token k does for every later token's TD error
            credit[k] = sum(DECAY ** (t - k) for t in range(k, places[-1] + 1))
        np.testing.assert_allclose(row["trace_weights"], credit, rtol=1e-5)
        np.testing.assert_allclose(row["advantages"], row["advantage"] * credit, rtol=1e-5)
        expected_N = token_logprobs(folder, completion["prompt_ids"], tokens)
        np.testing.assert_allclose(row["logprobs"], expected_N, atol=2e-5)


def test_rows_say_which_completions_have_a_part(logged) -> None:
    trained = [row["trained"] for row in read_credit(logged[0], 1).to_pylist()]
    # The middle reward of the first group is its mean; the last has no reward; then equal rewards.
    assert trained == [True, True, False, False, True, True, False, False, False]


def test_logging_changes_nothing_and_ranks_share_one_file(
    folder: Path, logged, tmp_path: Path
) -> None:
    with worker(folder, algorithm=ALGORITHM, tokens_per_microbatch=32) as made:
        assert untimed(made.step(guided_groups(), 0, 0)) == untimed(logged[1])
    on_ranks(2, _log_target, folder, tmp_path)
    assert credit_steps(tmp_path) == [1]
    mine, theirs = read_credit(tmp_path, 1), read_credit(logged[0], 1)
    for name in mine.column_names:
        if name in ("trace_weights", "advantages", "logprobs"):
            flat = [table[name].combine_chunks() for table in (mine, theirs)]
            assert flat[0].is_null().equals(flat[1].is_null())
            np.testing.assert_allclose(*[c.flatten().to_numpy() for c in flat], atol=2e-5)
        else:
            assert mine[name].equals(theirs[name]), name


def test_a_disk_that_does_not_take_it_ends_the_run(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "credit").write_text("a file where the folder should be")
    with (
        worker(folder, algorithm=ALGORITHM) as made,
        pytest.raises(RunError, match="the credit log of step 1 cannot be written"),
    ):
        _LogWork(tmp_path)(made)
