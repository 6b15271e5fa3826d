"""What a scorer reads before a completion: siblings, holes, lengths, and a learner behind them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from learner_models import save_tiny_model, trajectories
from learner_ranks import SHAPES, worker

from common.config.algorithm import AdvantageConfig, AlgorithmConfig
from common.config.contexts import HOLE
from common.errors import UserError
from common.record.credit_log import read_credit, read_scores
from learner.policy.contexts import in_context, siblings
from learner.policy.step_batch import StepBatch
from learner.training.rank import LearnerRank

REWARDS = [[1.0, 0.0, 1.0, 0.0], [0.0, 0.0], [0.0, 1.0, 0.0], [0.5, None, 2.0, 1.0]]
HEAD, TAIL = [11, 12, 13], [14, 15]


def groups(contexts: list[list[int]] | None = None) -> list[pa.RecordBatch]:
    """The groups of a step, with a context for every completion of each."""
    made = trajectories(SHAPES, rewards=REWARDS)
    if contexts is None:
        return made
    field = made[0].schema.get_field_index("context_ids")
    return [
        batch.set_column(
            field, batch.schema.field(field), pa.array([ids] * len(batch), pa.list_(pa.int32()))
        )
        for batch, ids in zip(made, contexts, strict=True)
    ]


def batch_of(contexts: list[list[int]]) -> StepBatch:
    return StepBatch.from_record_batches(groups(contexts))


def test_a_sibling_is_another_of_the_highest_reward_or_nobody() -> None:
    found = siblings(batch_of([HEAD] * 4), 1.0)
    # Of the first group each right one is shown the other; where one alone is right it is shown
    # nothing itself; where none is right nobody is; and 2.0 is above 1.0.
    assert found.tolist() == [2, 0, 0, 0, -1, -1, 7, -1, 7, 11, 11, 12, 11]


def test_a_sibling_stands_in_the_hole_as_it_was_sampled_without_its_end() -> None:
    batch = batch_of([[*HEAD, HOLE, *TAIL]] * 4)
    found = in_context(batch, sibling=True, sibling_reward=1.0, max_length=512)
    shown = siblings(batch, 1.0)
    assert found.scored_B.tolist() == (shown >= 0).tolist()
    assert (found.missing, found.too_long) == (3, 0)
    for completion in np.flatnonzero(found.scored_B):
        said = batch.token_ids[batch.tokens_of(shown[completion])][:-1].tolist()
        prompt = found.batch.prompts[found.batch.sequences.prompt_S[completion]]
        assert prompt.tolist() == [*HEAD, *said, *TAIL]
    cut = replace(batch, truncated_B=np.ones_like(batch.truncated_B))
    found = in_context(cut, sibling=True, sibling_reward=1.0, max_length=512)
    whole = cut.token_ids[cut.tokens_of(2)].tolist()
    assert found.batch.prompts[found.batch.sequences.prompt_S[0]].tolist() == [*HEAD, *whole, *TAIL]


def test_what_does_not_fit_or_is_missing_is_counted_and_not_scored() -> None:
    batch = batch_of([[5] * 40, [*HEAD, HOLE], HEAD, [HOLE]])
    found = in_context(batch, sibling=False, sibling_reward=1.0, max_length=47)
    # 40 tokens and 7 just fit.
    expected = [True, False, True, True] + [False] * 2 + [True] * 3 + [False] * 4
    assert found.scored_B.tolist() == expected
    assert (found.missing, found.too_long) == (6, 1)


def test_groups_of_a_run_without_contexts_are_refused() -> None:
    batch = StepBatch.from_record_batches(groups())
    with pytest.raises(UserError, match="no contexts on record"):
        in_context(batch, sibling=False, sibling_reward=1.0, max_length=512)


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("policy"))


def by(kind: str, against: Any = "policy", **advantage: Any) -> AlgorithmConfig:
    return AlgorithmConfig(advantage=AdvantageConfig(kind=kind, against=against, **advantage))


def test_the_policy_behind_its_own_prompt_says_what_it_said(policy: Path, tmp_path: Path) -> None:
    """Prompts as contexts: the weights of RLSD are 1, and its step is GRPO's, bitwise."""
    prompts = [batch.column("prompt_ids")[0].as_py() for batch in groups()]
    with worker(policy, algorithm=by("evidence", scorer="policy", context="answer")) as made:
        found = made.step(groups(prompts), 0, 0, str(tmp_path / "mine"))
    with worker(policy) as made:
        plain = made.step(groups(), 0, 0, str(tmp_path / "plain"))
    for name in ("grad_norm", "loss/policy", "tokens/trained"):
        assert found[name] == plain[name]
    mine, theirs = (read_credit(tmp_path / name, 1) for name in ("mine", "plain"))
    assert mine["advantage"].equals(theirs["advantage"])


def test_scores_are_those_behind_the_context_and_others_are_not_trained_on(
    policy: Path, tmp_path: Path
) -> None:
    """Against the untouched model of transformers behind the sibling's context."""
    from transformers import AutoModelForCausalLM

    given = groups([[*HEAD, HOLE, *TAIL]] * 4)
    algorithm = by("distill", scorer="policy", context="sibling")
    with worker(policy, algorithm=algorithm) as made:
        metrics = made.step(given, 0, 0, str(tmp_path))
    assert metrics["scorer/without_context"] == 3
    scores, credit = read_scores(tmp_path, 1), read_credit(tmp_path, 1)
    batch = StepBatch.from_record_batches(given)
    shown = siblings(batch, 1.0)
    assert credit["trained"].to_pylist() == [
        place >= 0 and not np.isnan(reward)
        for place, reward in zip(shown, batch.rewards_B, strict=True)
    ]
    model = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32)
    keys = zip(credit["group_id"].to_pylist(), credit["completion_index"].to_pylist(), strict=True)
    for completion, key in enumerate(keys):
        if shown[completion] < 0:
            assert np.isnan(scores[key]).all()
            continue
        before = [*HEAD, *batch.token_ids[batch.tokens_of(shown[completion])][:-1], *TAIL]
        said = batch.token_ids[batch.tokens_of(completion)]
        with torch.no_grad():
            logits = model(torch.tensor([[*before, *said]])).logits[0, len(before) - 1 : -1] / 0.9
        expected = logits.log_softmax(-1).gather(1, torch.from_numpy(said)[:, None])[:, 0]
        np.testing.assert_allclose(scores[key], expected.numpy(), atol=2e-5)


def _average_gap(made: LearnerRank, before: list[torch.Tensor], rate: float) -> float:
    average, policy = made.trainer.models.average, made.trainer.policy
    assert average is not None
    gaps = [
        (mine.full_tensor() - ((1 - rate) * old + rate * now.detach().full_tensor())).abs().max()
        for mine, old, now in zip(
            average.model.model.parameters(), before, policy.model.parameters(), strict=True
        )
    ]
    return float(max(gaps))


def test_after_one_step_the_average_is_mostly_itself_and_a_little_the_policy(policy: Path) -> None:
    """theta_E = .95 theta_E + .05 theta: the other way round it would follow at once."""
    algorithm = by("distill", "sampler", scorer="ema", ema_rate=0.05)
    with worker(policy, algorithm=algorithm, learning_rate=1e-2) as made:
        before = [p.detach().full_tensor().clone() for p in made.trainer.policy.model.parameters()]
        made.step(trajectories(SHAPES), 0, 0)
        moved = made.trainer.policy.model.parameters()
        distance = max(
            float((a - b.detach().full_tensor()).abs().max())
            for a, b in zip(before, moved, strict=True)
        )
        assert distance > 1e-3
        assert _average_gap(made, before, 0.05) < 1e-7
        assert _average_gap(made, before, 0.95) > 0.5 * distance


def test_the_average_moves_every_few_steps_alone(policy: Path) -> None:
    algorithm = by("distill", "sampler", scorer="ema", ema_rate=1.0, ema_sync_steps=2)
    with worker(policy, algorithm=algorithm) as made:
        average = made.trainer.models.average
        assert average is not None
        first = [p.full_tensor().clone() for p in average.model.model.parameters()]
        for version in range(2):
            made.step(trajectories(SHAPES, version=version), version, 0)
            now = [p.full_tensor() for p in average.model.model.parameters()]
            same = all(torch.equal(a, b) for a, b in zip(first, now, strict=True))
            assert same == (version == 0)
        policy_now = made.trainer.policy.model.parameters()
        assert all(torch.equal(a, b.full_tensor()) for a, b in zip(now, policy_now, strict=True))


def test_a_resumed_average_is_bitwise_the_unbroken_one(policy: Path, tmp_path: Path) -> None:
    algorithm, saved = by("distill", "sampler", scorer="ema", ema_rate=0.3), tmp_path / "step-1"
    with worker(policy, algorithm=algorithm, learning_rate=1e-2) as made:
        made.step(trajectories(SHAPES), 0, 0)
        made.take_checkpoint({})
        made.write_checkpoint(str(saved))
        made.step(trajectories(SHAPES, seed=7), 0, 0, str(tmp_path / "unbroken"))
        unbroken = read_scores(tmp_path / "unbroken", 1)
    with worker(saved, algorithm=algorithm, learning_rate=1e-2, reference=policy) as made:
        made.load_checkpoint(str(saved))
        made.step(trajectories(SHAPES, seed=7), 0, 0, str(tmp_path / "resumed"))
        resumed = read_scores(tmp_path / "resumed", 1)
    for key, values in unbroken.items():
        np.testing.assert_array_equal(values, resumed[key])
    with worker(saved, reference=policy) as made:  # a replay of the run has no average
        assert made.load_checkpoint(str(saved)) == {}


def test_a_checkpoint_without_an_average_is_refused(policy: Path, tmp_path: Path) -> None:
    with worker(policy) as made:
        made.take_checkpoint({})
        made.write_checkpoint(str(tmp_path / "step-0"))
    with (
        worker(policy, algorithm=by("distill", "sampler", scorer="ema")) as made,
        pytest.raises(UserError, match="no moving average"),
    ):
        made.load_checkpoint(str(tmp_path / "step-0"))
