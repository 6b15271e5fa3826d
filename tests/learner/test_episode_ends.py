"""What becomes of an episode in the learner, for every way in which one ends."""

from __future__ import annotations

import pytest
import torch
from ended_episodes import ENDS, ended
from maths_oracles import algorithm

from learner.algorithm.prepared import Prepared
from learner.algorithm.recipe import Recipe
from learner.policy.packing import StepBatch

FAILED = [reward is None for _, _, reward in ENDS]
CUT = [finish in ("turns", "context", "length") for finish, _, _ in ENDS]


def prepared(ends=ENDS, **config: object) -> Prepared:
    batch = StepBatch.from_record_batches([ended(ends)])
    return Recipe(algorithm(**config), "none", 32).prepare(batch.rewarded("environment"))


def test_the_rows_are_read_as_they_ended() -> None:
    batch = StepBatch.from_record_batches([ended()])
    assert torch.from_numpy(batch.rewards_B).isnan().tolist() == FAILED
    assert batch.truncated_B.tolist() == CUT
    assert batch.trained_lengths_B.tolist() == batch.sampled_lengths_B.tolist()
    assert batch.sampled_lengths_B.tolist() == [3, 5, 5, 4, 4, 6, 3, 0]


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "rloo", "reinforce_pp", "krpo"])
@pytest.mark.parametrize("advantage", ["completion", "turn_return", "turn_outcome"])
def test_failed_siblings_are_in_no_baseline_and_in_no_loss(kind: str, advantage: str) -> None:
    """Those with a reward have the advantage that they have without the others, bit for bit."""
    config = {"baseline": {"kind": kind}, "advantage": {"kind": advantage}}
    found = prepared(**config)
    alone = prepared([end for end in ENDS if end[2] is not None], **config)
    judged = ~torch.tensor(FAILED)
    assert torch.equal(found.advantages_B[judged], alone.advantages_B)
    assert torch.equal(found.token_weights_B[judged], alone.token_weights_B)
    assert not found.kept_B[~judged].any()
    assert not found.trained_B[~judged].any()
    assert found.token_weights_B[~judged].tolist() == [0.0] * sum(FAILED)
    assert found.advantages_B[~judged].tolist() == [0.0] * sum(FAILED)
    if found.advantages_N is not None:
        assert alone.advantages_N is not None
        mine = found.advantages_N[found.advantages_N != 0]
        assert torch.equal(mine, alone.advantages_N[alone.advantages_N != 0])


def test_mask_truncated_leaves_out_every_kind_of_limit() -> None:
    """They stay in the baseline: what they were worth is known."""
    plain, masked = prepared(), prepared(rollout={"mask_truncated": True})
    kept = [not cut and not failed for cut, failed in zip(CUT, FAILED, strict=True)]
    assert masked.kept_B.tolist() == kept
    assert torch.equal(masked.advantages_B[masked.kept_B], plain.advantages_B[masked.kept_B])
    assert not masked.token_weights_B[~masked.kept_B].any()
    assert plain.kept_B.tolist() == [not failed for failed in FAILED]


@pytest.mark.parametrize("finish", ["turns", "context", "length"])
def test_each_limit_alone_is_masked(finish: str) -> None:
    ends = [(finish, "pass", 1.0), ("stop", "fail", 0.0), ("stop", "pass", 1.0)]
    assert prepared(ends, rollout={"mask_truncated": True}).kept_B.tolist() == [False, True, True]


def test_a_group_of_failures_alone_trains_nothing() -> None:
    found = prepared([end for end in ENDS if end[2] is None])
    assert not found.kept_B.any()
    assert not found.trained_B.any()
