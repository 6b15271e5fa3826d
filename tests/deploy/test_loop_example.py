"""`deploy/examples/loop.py` computes what the real learner computes, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from learner_models import save_tiny_model, trajectories
from learner_ranks import SHAPES

from common.config.sections import Config
from deploy.command.presets import load
from deploy.examples.loop import TINY, as_batch, backward
from deploy.models.resolve import ModelLocation
from deploy.run.actors import learner_job
from learner.algorithm.recipe import Recipe
from learner.policy.model import load_policy
from learner.policy.step_batch import StepBatch
from learner.training.rank import LearnerRank

Gradients = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """The learner sets their number, which decides how sums round, for all tests behind it."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def config_of(folder: Path, *overrides: str) -> Config:
    return load(
        TINY,
        [
            f"model.path={folder}",
            "generator.max_staleness=0",
            "learner.max_grad_norm=.inf",  # gradients as they come, not scaled
            "algorithm.objective.updates_per_batch=1",
            *overrides,
        ],
    )


def as_vllm_answers(groups: Sequence[pa.RecordBatch]) -> tuple[list[Any], list[list[Any]], list]:
    """(prompts, completions, rewards) as the loop has them, from the record batches of a run."""
    prompts, answers, rewards = [], [], []
    for group in groups:
        rows = group.to_pylist()
        prompts.append(SimpleNamespace(token_ids=rows[0]["prompt_ids"]))
        answers.append(
            [
                SimpleNamespace(
                    token_ids=row["token_ids"],
                    finish_reason=row["finish_reason"],
                    logprobs=[
                        {token: SimpleNamespace(logprob=value)}
                        for token, value in zip(
                            row["token_ids"], row["behaviour_logprobs"], strict=True
                        )
                    ],
                )
                for row in rows
            ]
        )
        rewards += [np.nan if row["reward"] is None else row["reward"] for row in rows]
    return prompts, answers, rewards


def gradients_of_the_real_step(config: Config, groups: Sequence[pa.RecordBatch]) -> Gradients:
    found: Gradients = {}
    job = learner_job(config, ModelLocation(config.model.path, config.model.path))
    rank = LearnerRank(job, rank=0, put=lambda buffer: buffer)
    rank.setup(*rank.rendezvous_address())
    try:
        model = rank.trainer.policy.model

        def keep(*_: object) -> None:
            for name, parameter in model.named_parameters():
                assert parameter.grad is not None
                found[name] = parameter.grad.full_tensor().clone()

        (optimizer,) = rank.trainer.optimizers
        optimizer.register_step_pre_hook(keep)
        rank.step(groups, version=0, max_staleness=0)
    finally:
        rank.shutdown()
    return found


def gradients_of_the_loop(config: Config, batch: StepBatch) -> Gradients:
    torch.set_num_threads(config.learner.threads or 1)
    policy, _ = load_policy(
        config.model,
        torch.float32,
        logits_mib=config.learner.logits_mib,
        temperature=config.generator.temperature,
        weights=True,
    )
    limit = config.generator.max_completion_tokens
    recipe = Recipe(config.algorithm, config.correction_kind, limit)
    backward(policy, recipe, batch, config)
    return {n: p.grad for n, p in policy.model.named_parameters() if p.grad is not None}


def test_its_batch_is_the_real_one() -> None:
    rewards = [[1.0] * 3 + [None], [0.0, 1.0], [0.5, 0.0, 1.0], [0.0, 1.0, 0.0, 0.0]]
    groups = trajectories(SHAPES, rewards=rewards)
    found = as_batch(*as_vllm_answers(groups))
    expected = StepBatch.from_record_batches(groups)
    assert found.turns is expected.turns is None  # an answer is one turn
    for name, value in vars(expected).items():
        # What the loop has no need of: rewards by verifier, and where teachers look for the answer.
        if value is None or name in ("parts", "answers_B2"):
            continue
        np.testing.assert_array_equal(np.hstack(getattr(found, name)), np.hstack(value), name)


@pytest.mark.parametrize("tokens", [64, 4096])
@pytest.mark.parametrize("recipe", ["grpo_lambda_recent", "lambda_grpo", "dapo", "gspo", "grpo"])
def test_its_gradient_is_that_of_the_real_step(folder: Path, recipe: str, tokens: int) -> None:
    """Bit for bit, in many micro-batches and in one."""
    config = config_of(folder, f"recipe={recipe}", f"batch.tokens_per_microbatch={tokens}")
    groups = trajectories(SHAPES)
    expected = gradients_of_the_real_step(config, groups)
    found = gradients_of_the_loop(config, as_batch(*as_vllm_answers(groups)))
    assert found.keys() == expected.keys()
    assert any(bool(gradient.any()) for gradient in found.values())
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name
