"""Learner steps on real FSDP: budgets, packings, ranks and exports change nothing."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from learner_models import save_tiny_model, tiny_model, trajectories
from learner_ranks import (
    SHAPES,
    assert_same_training,
    make_worker,
    on_ranks,
    train,
    train_work,
    untimed,
    weights,
    worker,
)
from transformers import AutoModelForCausalLM
from turn_columns import answer_columns

from common.config.algorithm import AlgorithmConfig
from common.config.sections import LearnerConfig, ModelConfig
from common.errors import RunError, UserError, WeightsError
from common.record.credit_log import read_credit
from common.weights.buckets import check_bucket, pack_tensors, unpack_tensors
from learner.policy.logprobs import LogitTransform
from learner.policy.model import Policy, load_policy
from learner.policy.self_check import check_policy
from learner.policy.step_batch import StepBatch
from learner.training.schedule import learning_rate
from learner.training.work import step_rewards

COMPILES = [
    pytest.mark.long,  # compiling takes a minute
    pytest.mark.skipif(
        shutil.which("g++") is None, reason="torch.compile on CPU needs a C++ compiler"
    ),
]


def _train_target(rank: int, ranks: int, folder: Path, changes: dict) -> tuple:
    return make_worker(folder, rank, ranks, **changes), train_work


def _logged_target(rank: int, ranks: int, folder: Path, changes: dict, run: Path) -> tuple:
    return make_worker(folder, rank, ranks, **changes), partial(train_work, credit_run=str(run))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def baseline(folder: Path) -> tuple[list[dict], dict, dict]:
    return train(folder)


def test_a_step_moves_the_weights_and_reports_the_contract(folder: Path, baseline) -> None:
    metrics, exported, _ = baseline
    initial = dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters())
    assert exported.keys() == initial.keys()
    assert all(np.abs(exported[n] - p.detach().numpy()).max() > 1e-4 for n, p in initial.items())
    contract = (
        "loss/policy loss/kl grad_norm clip_fraction is_ratio/mean logprob_gap/mean "
        "packing/efficiency staleness/max staleness/mean tokens/trained learning_rate "
        "completions/zero_advantage time/rank_train reward/mean reward/accuracy "
        "completion_length/mean"
    )
    assert set(contract.split()) <= metrics[0].keys()
    assert metrics[0]["tokens/trained"] == sum(sum(lengths) for _, lengths in SHAPES)
    assert all(np.isfinite(list(m.values())).all() for m in metrics)


@pytest.mark.parametrize(
    "changes",
    [
        {"packing": "sequence"},
        {"tokens_per_microbatch": 4096},
        {"tokens_per_microbatch": 1},
        {"logits_mib": 0.0005},
        {"activation_checkpointing": True},
        pytest.param({"compile": True}, marks=COMPILES),
        pytest.param({"compile": True, "activation_checkpointing": True}, marks=COMPILES),
    ],
)
def test_how_it_is_computed_changes_nothing(folder: Path, baseline, changes) -> None:
    assert_same_training(train(folder, **changes), baseline)


@pytest.mark.parametrize("budget", [64, 4096, 1])
def test_two_ranks_equal_one(folder: Path, baseline, tmp_path: Path, budget: int) -> None:
    """With budget 1 each of the 13 completions is a micro-batch, and one rank has an empty one."""
    changes = {"tokens_per_microbatch": budget}
    results = on_ranks(2, _logged_target, folder, changes, tmp_path)
    for step in (1, 2):
        logprobs = read_credit(tmp_path, step)["logprobs"].to_pylist()
        assert [len(of) for of in logprobs] == [n for _, lengths in SHAPES for n in lengths]
    for mine, theirs in zip(results[0][0], results[1][0], strict=True):
        assert untimed(mine) == untimed(theirs)
    assert results[1][1] == {}
    assert_same_training(results[0], baseline)


def test_a_second_run_in_the_same_process_knows_nothing_of_the_first(
    folder: Path, baseline
) -> None:
    with worker(folder, kl=0.1, learning_rate=1e-2, seed=5) as made:
        train_work(made)
        made.shutdown()
        made.begin(make_worker(folder)._job)
        made.setup(*made.rendezvous_address())
        again = train_work(made)
    assert_same_training(again, baseline)


def test_bfloat16_follows_float32(folder: Path, baseline) -> None:
    with worker(folder, dtype="bfloat16") as made:
        metrics, _, _ = train_work(made)
        assert all(tensor.dtype == torch.bfloat16 for tensor in weights(made).values())
    for mine, theirs in zip(metrics, baseline[0], strict=True):
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=0.1)


def test_second_epoch_compares_with_the_policy_before_the_first(folder: Path) -> None:
    once, *_ = train(folder, steps=1)
    twice, *_ = train(folder, steps=1, epochs=2, learning_rate=1e-2)
    assert once[0]["clip_fraction"] == 0.0
    assert twice[0]["clip_fraction"] > 0.0
    assert twice[0]["is_ratio/mean"] == pytest.approx(once[0]["is_ratio/mean"])


def test_reference_policy_holds_the_first_weights(folder: Path) -> None:
    metrics, *_ = train(folder, kl=0.1, learning_rate=1e-2)
    assert metrics[0]["loss/kl"] == pytest.approx(0.0, abs=1e-6)
    assert metrics[1]["loss/kl"] > 1e-5


def test_kl_in_the_reward_is_the_sampler_against_the_reference(folder: Path) -> None:
    batches = trajectories(SHAPES)
    step = StepBatch.from_record_batches(batches)
    model = tiny_model("llama_tied")
    expected = []
    for b, group in enumerate(step.group_B):
        tokens = step.tokens_of(b)
        prompt, ids = step.prompts[group].tolist(), step.token_ids[tokens].tolist()
        logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1] / 0.9
        reference = logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]
        sampled = torch.from_numpy(step.behaviour_logprobs[tokens])
        expected.append(float((sampled - reference.detach()).nansum()))
    plain, *_ = train(folder, steps=1)
    results = on_ranks(2, _train_target, folder, {"kl": 0.01, "kl_in": "reward"})
    with worker(folder, kl=0.01, kl_in="reward") as made:
        shaped, found = made.trainer.scoring.scored(made.trainer.recipe, step)
        alone = train_work(made)
    np.testing.assert_allclose(shaped.rewards_B, step.rewards_B - 0.01 * np.array(expected), 1e-4)
    assert found["reward/kl_penalty"] == pytest.approx(0.01 * np.mean(expected), rel=1e-4)
    assert alone[0][0]["grad_norm"] != pytest.approx(plain[0]["grad_norm"], rel=1e-3)
    assert_same_training(results[0], alone)


def test_the_credit_probe_is_the_gradient_norm_that_grpo_would_have(folder: Path, baseline) -> None:
    grpo = baseline[0][0]["grad_norm"]
    assert "grad_norm/broadcast_credit" not in baseline[0][0]
    for decay in (0.0, 0.9):
        algorithm = AlgorithmConfig()
        algorithm.credit.kind, algorithm.credit.lambda_ = "lambda_trace", decay
        every_step = train(folder, algorithm=algorithm, credit_probe_every=1)
        never = train(folder, algorithm=algorithm, credit_probe_every=0)
        assert every_step[0][0]["grad_norm/broadcast_credit"] == pytest.approx(grpo, rel=1e-5)
        assert (every_step[0][0]["grad_norm"] == pytest.approx(grpo, rel=1e-5)) == (decay == 0)
        assert_same_training(every_step, never)  # measuring changes nothing
    every_other = train(folder, algorithm=algorithm, credit_probe_every=2)
    assert ["grad_norm/broadcast_credit" in step for step in every_other[0][:2]] == [False, True]


def test_two_ranks_learn_the_same_length_preference(folder: Path) -> None:
    algorithm = AlgorithmConfig()
    algorithm.aggregation.kind = "lambda_grpo"
    changes = {"algorithm": algorithm}
    alone = train(folder, **changes)
    results = on_ranks(2, _train_target, folder, changes)
    learned = [metrics["lambda_grpo/lambda"] for metrics in alone[0]]
    assert learned[1] != learned[0] != 0.0
    for rank in (0, 1):
        found = [metrics["lambda_grpo/lambda"] for metrics in results[rank][0]]
        assert found == pytest.approx(learned, rel=1e-4)
    assert_same_training(results[0], alone)


def test_prefix_sets_count_what_completions_share(folder: Path) -> None:
    """Four letters: many completions begin alike, so their tokens weigh less than in GRPO."""
    algorithm = AlgorithmConfig()
    algorithm.credit.kind = "prefix_sets"
    groups = trajectories(SHAPES, vocabulary=5)
    norms = []
    for changes in ({}, {"algorithm": algorithm}, {"algorithm": algorithm, "packing": "sequence"}):
        with worker(folder, **changes) as made:
            norms.append(made.step(groups, 0, 0)["grad_norm"])
    assert norms[1] == pytest.approx(norms[2], rel=1e-4)
    assert abs(norms[1] / norms[0] - 1) > 0.05


def test_prefix_sets_do_not_count_what_was_not_judged(folder: Path) -> None:
    """A completion without a reward is in no set: the step is the one without it."""
    algorithm = AlgorithmConfig()
    algorithm.credit.kind = "prefix_sets"
    rewards = [[None, 1.0, *[0.0] * (len(lengths) - 2)] for _, lengths in SHAPES]
    groups = trajectories(SHAPES, vocabulary=5, rewards=rewards)
    norms = []
    for judged in (groups, [group.slice(1) for group in groups]):
        with worker(folder, algorithm=algorithm) as made:
            norms.append(made.step(judged, 0, 0)["grad_norm"])
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


def test_masked_guidance_is_a_longer_prompt(folder: Path) -> None:
    """A group guided by the same tokens trains as one with these in its prompt."""
    guided = [with_shared_guidance(group, 3) for group in trajectories([(6, [10, 7, 8, 9])])]
    results = []
    for groups in (guided, [as_prompt(group, 3) for group in guided]):
        with worker(folder) as made:
            metrics = made.step(groups, 0, 0)
            results.append((metrics, weights(made)))
    (first, moved), (second, expected) = results
    assert first["tokens/trained"] == second["tokens/trained"] == 22
    for name in ("loss/policy", "grad_norm", "is_ratio/mean", "logprob_gap/mean"):
        assert first[name] == pytest.approx(second[name], rel=1e-4), name
    for name, tensor in expected.items():
        assert (moved[name] - tensor).abs().max() < 2e-4, name


def with_shared_guidance(group: pa.RecordBatch, length: int) -> pa.RecordBatch:
    """Every completion begins with the same tokens, which were given: masked, no behaviour."""
    rows = group.to_pylist()
    for row in rows:
        row["token_ids"][:length] = rows[0]["token_ids"][:length]
        row["behaviour_logprobs"][:length] = [math.nan] * length
        row["loss_mask"][:length] = [False] * length
        row["guidance_length"] = length
        row.update(answer_columns(length, len(row["token_ids"])))
    return pa.RecordBatch.from_pylist(rows, schema=group.schema)


def as_prompt(group: pa.RecordBatch, length: int) -> pa.RecordBatch:
    rows = group.to_pylist()
    for row in rows:
        row["prompt_ids"] = row["prompt_ids"] + row["token_ids"][:length]
        for name in ("token_ids", "behaviour_logprobs", "loss_mask", "weight_versions"):
            row[name] = row[name][length:]
        row["guidance_length"] = 0
        row.update(answer_columns(0, len(row["token_ids"])))
    return pa.RecordBatch.from_pylist(rows, schema=group.schema)


def test_prefix_sets_and_entropy_reach_the_recipe(folder: Path) -> None:
    for kind, quantile in (("prefix_sets", 0.0), ("lambda_trace", 0.3)):
        algorithm = AlgorithmConfig()
        algorithm.credit.kind = kind
        algorithm.credit.entropy_quantile = quantile
        small, *_ = train(folder, steps=1, algorithm=algorithm)
        large, *_ = train(folder, steps=1, algorithm=algorithm, tokens_per_microbatch=4096)
        assert small[0]["grad_norm"] > 0
        if kind == "prefix_sets":
            assert small[0]["grad_norm"] == pytest.approx(large[0]["grad_norm"], rel=1e-4)


def test_equal_rewards_train_nothing_and_move_nothing(folder: Path) -> None:
    with worker(folder) as made:
        made.step(trajectories(SHAPES), 0, 0)
        before = weights(made)
        rewards = [[1.0] * len(lengths) for _, lengths in SHAPES]
        rewards[1] = [None, None]
        metrics = made.step(trajectories(SHAPES, rewards=rewards), 0, 0)
        after = weights(made)
    assert all(torch.equal(before[n], after[n]) for n in before)
    assert metrics["tokens/trained"] == 0 and metrics["grad_norm"] == 0
    assert metrics["completions/zero_advantage"] == 11
    assert metrics["reward/mean"] == 1.0


def test_a_bonus_alone_raises_the_entropy(folder: Path) -> None:
    """Equal rewards: no advantage, and still a gradient, which is that of the mean entropy."""
    rewards = [[1.0] * len(lengths) for _, lengths in SHAPES]
    seen = []
    with worker(folder, entropy=0.5, learning_rate=1e-2) as made:
        for version in range(3):
            seen.append(made.step(trajectories(SHAPES, rewards=rewards), version, version))
    assert seen[0]["loss/policy"] == 0
    assert seen[0]["loss/entropy"] < 0
    assert seen[0]["tokens/trained"] > 0
    entropies = [metrics["entropy/mean"] for metrics in seen]
    assert entropies[0] < entropies[1] < entropies[2]


def test_every_verifiers_rewards_reach_the_recipe_with_their_weight(folder: Path) -> None:
    batch = StepBatch.from_record_batches(trajectories(SHAPES))
    with worker(folder, kl=0.1, kl_in="reward") as made:
        job = replace(made.trainer.job, reward_weights={"test": 0.25})
        shaped, _ = made.trainer.scoring.scored(made.trainer.recipe, batch)
    (part,) = step_rewards(batch, job).parts
    assert part.weight == 0.25
    assert part.values.tolist() == batch.rewards_B.tolist()
    rewards, penalty = step_rewards(shaped, job).parts
    assert rewards.values.tolist() == batch.rewards_B.tolist()
    total = part.values + penalty.weight * penalty.values
    np.testing.assert_allclose(total, shaped.rewards_B, rtol=1e-12)


def test_pruned_completions_are_not_counted_as_without_advantage(folder: Path) -> None:
    algorithm = AlgorithmConfig()
    algorithm.rollout.prune_rate = 0.5  # leaves those of the largest advantages
    metrics, *_ = train(folder, steps=1, algorithm=algorithm)
    assert metrics[0]["tokens/trained"] > 0
    assert metrics[0]["completions/zero_advantage"] == 0


def test_stale_and_future_tokens_stop_the_run(folder: Path) -> None:
    with worker(folder) as made:
        metrics = made.step(trajectories(SHAPES, version=5), 6, 1)
        assert metrics["staleness/max"] == metrics["staleness/mean"] == 1.0
        with pytest.raises(RunError, match="max_staleness"):
            made.step(trajectories(SHAPES, version=5), 7, 1)
        with pytest.raises(RunError, match="versions 8"):
            made.step(trajectories(SHAPES, version=8), 7, 1)


def test_score_is_what_transformers_says(folder: Path) -> None:
    random = np.random.default_rng(0)
    sequences = [random.integers(3, 97, n).tolist() for n in (12, 30, 7)]
    prompts = [4, 10, 6]
    with worker(folder) as made:
        made.step(trajectories(SHAPES), 0, 0)
        found = made.score(sequences, prompts)
        state = weights(made)
        made.step(trajectories(SHAPES), 0, 0)  # still trains after a forward without backward
    model = tiny_model("llama_tied")
    model.load_state_dict(state, strict=False)
    for ids, prompt, scores in zip(sequences, prompts, found, strict=True):
        logprobs = model(torch.tensor([ids])).logits[0, prompt - 1 : -1].log_softmax(-1)
        expected = logprobs.gather(1, torch.tensor(ids[prompt:])[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(scores), expected, atol=1e-4, rtol=0)


def test_buckets_reassemble_to_the_model(folder: Path) -> None:
    expected = dict(tiny_model("llama_tied").named_parameters())
    tensors = [(name, p.to(torch.bfloat16)) for name, p in expected.items()]
    buckets = list(pack_tensors(tensors, 20_000))
    assert len(buckets) > 3 and all(b.buffer.nbytes == b.nbytes <= 20_000 for b in buckets)
    found = dict(pair for b in buckets for pair in unpack_tensors(b, b.buffer))
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors)
    assert "lm_head.weight" not in found


def test_a_damaged_bucket_is_refused() -> None:
    (bucket,) = pack_tensors([("a", torch.arange(6.0)), ("b", torch.tensor(1.0))], 10**6)
    assert dict(unpack_tensors(bucket, bucket.buffer))["b"].shape == ()
    bucket.buffer[3] ^= 1
    with pytest.raises(WeightsError, match="damaged"):
        check_bucket(bucket, bucket.buffer)


@pytest.mark.parametrize("architecture", ["gemma2", "granite", "gpt_neox", "llama_untied"])
def test_self_check_passes_for_known_architectures(architecture: str, tmp_path: Path) -> None:
    tiny_model(architecture).save_pretrained(tmp_path)
    config = ModelConfig(path=str(tmp_path))
    _, gap = load_policy(config, torch.float32, logits_mib=0.001, temperature=0.8, weights=True)
    check_policy(gap, torch.float32, config.path)


def test_self_check_refuses_an_unknown_logit_transform(tmp_path: Path, monkeypatch) -> None:
    tiny_model("granite").save_pretrained(tmp_path)
    monkeypatch.setattr(
        "learner.policy.model._take_over_logit_transform",
        lambda model: LogitTransform(),
    )
    config = ModelConfig(path=str(tmp_path))
    _, gap = load_policy(config, torch.float32, logits_mib=0.001, temperature=1.0, weights=True)
    with pytest.raises(UserError, match="disagrees"):
        check_policy(gap, torch.float32, config.path)


def _untied_target(rank: int, ranks: int, tied: Path, untied: Path) -> tuple:
    return make_worker(untied if rank else tied, rank, ranks), train_work


def test_ranks_with_different_models_are_told_so(folder: Path, tmp_path: Path) -> None:
    save_tiny_model(tmp_path, "llama_untied")
    with pytest.raises(AssertionError, match="hold different models: lm_head.weight"):
        on_ranks(2, _untied_target, folder, tmp_path)


def test_missing_model_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="model.path"):
        load_policy(
            ModelConfig(path=str(tmp_path / "none")),
            torch.float32,
            logits_mib=0.001,
            temperature=1.0,
            weights=True,
        )


def test_quantised_weights_are_refused(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (folder / "config.json").write_text(json.dumps(config))
    for reads in (True, False):
        with pytest.raises(UserError, match="quantised \\(fp8\\)"):
            load_policy(
                ModelConfig(path=str(folder)),
                torch.float32,
                logits_mib=0.001,
                temperature=1.0,
                weights=reads,
            )


def test_layers_are_found() -> None:
    assert len(Policy(tiny_model("gpt_neox"), 8).layers) == 2


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 0.5, 0.0]),
        ("cosine", [0.5, 1.0, 1.0, 0.5, 0.0]),
    ],
)
def test_learning_rate(schedule, expected) -> None:
    config = LearnerConfig(learning_rate=1.0, warmup_steps=2, schedule=schedule)
    rates = [learning_rate(config, step, 6) for step in (0, 1, 2, 4, 6)]
    assert rates == pytest.approx(expected)
