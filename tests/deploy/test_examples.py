"""The examples that people copy: each in one short file, and right."""

from __future__ import annotations

import importlib
import json
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
import torch
from maths_oracles import algorithm, normal, random, random_batch

from actors.data.quarantine import Quarantine
from actors.data.sources import load_rows
from actors.sandbox.sandbox import RuleSpec, Sandbox, Task
from actors.verifiers.registry import JUDGE
from common.config.algorithm import BaselineConfig, CreditConfig
from common.config.load import load_config
from common.config.sections import Config
from deploy.command.presets import RECIPES
from deploy.examples.advantage import by_rank
from deploy.examples.credit import by_entropy
from deploy.examples.verifier import right_and_short
from learner.algorithm.credit import CreditInputs
from learner.algorithm.grouped import GroupedRewards
from learner.algorithm.loss import policy_loss
from learner.algorithm.recipe import Recipe
from learner.algorithm.recipe_checks import check_recipe
from learner.algorithm.rewarded import Rewarded
from learner.algorithm.traces import PackedAxis

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted(
    path for path in (ROOT / "deploy" / "examples").glob("[a-z]*.py") if path.stem != "loop"
)
RULE = "deploy.examples.credit:by_entropy"


def shown_config(path: Path) -> Config:
    """The configuration of the command in an example's docstring."""
    text = importlib.import_module(f"deploy.examples.{path.stem}").__doc__ or ""
    command = next(line for line in text.replace("\\\n", " ").splitlines() if " train " in line)
    words = shlex.split(command)
    overrides = [word for word in words if re.match(r"[a-z_.]+=", word)]
    return load_config([ROOT / words[words.index("--config") + 1]], overrides, RECIPES)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_it_is_short_and_its_command_is_a_configuration(path: Path) -> None:
    assert len(path.read_text().splitlines()) < 40
    config = shown_config(path)
    check_recipe(config.algorithm, config.correction_kind)


@pytest.mark.parametrize(
    ("text", "reward"),
    [("= 7", 1.0), ("3 + 4 = 7", 1.0), ("I believe it is 7", 0.5), ("7 no 8", 0.0), ("?", 0.0)],
)
def test_the_verifier_prefers_short_right_answers(text: str, reward: float) -> None:
    assert right_and_short(text, {"answer": "7"}) == reward


def test_the_verifier_runs_in_the_sandbox_as_the_configuration_names_it() -> None:
    (spec,) = shown_config(EXAMPLES[-1]).verifier.rules
    sandbox = Sandbox(JUDGE, [RuleSpec("mine", spec.name, dict(spec.args))], 10.0)
    try:
        found = sandbox.score([Task(0, "so 7", json.dumps({"answer": "7"}))])
    finally:
        sandbox.close()
    assert [verdict.reward for verdict in found] == [1.0]


def test_the_data_set_is_read_as_its_command_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = next(path for path in EXAMPLES if path.stem == "data_set")
    monkeypatch.setattr(sys, "argv", [str(path), str(tmp_path / "products.jsonl")])
    runpy.run_path(str(path), run_name="__main__")
    config = shown_config(path)
    config.data.path = str(tmp_path / "products.jsonl")
    rows = load_rows(config.data, config.eval.prompts, config.seed, Quarantine(0.0))
    assert (len(rows.train), len(rows.held_out)) == (900 - config.eval.prompts, config.eval.prompts)
    for row in rows.train:
        a, b = map(int, row.question.rstrip(" =").split(" * "))
        assert json.loads(row.reference)["answer"] == str(a * b)


def test_the_estimator_goes_by_rank() -> None:
    """By hand: 9 beats three, 1 beats one and loses to two; size does not matter, order does."""
    rewards_V = torch.tensor([9.0, 1.0, 5.0, 0.0, 2.0, 2.0, 7.0], dtype=torch.float64)
    lengths_V = torch.ones(7)
    grouped = GroupedRewards(rewards_V, torch.tensor([0, 0, 0, 0, 1, 1, 2]), lengths_V)
    found = by_rank(grouped, BaselineConfig())
    assert found.advantages_V.tolist() == pytest.approx([1, -1 / 3, 1 / 3, -1, 0, 0, 0])
    assert found.metrics == {"advantage/tied": 3 / 7}
    larger = GroupedRewards(rewards_V**3, grouped.group_V, lengths_V)
    assert torch.equal(by_rank(larger, BaselineConfig()).advantages_V, found.advantages_V)


def test_an_estimator_of_ones_own_reaches_the_weights_and_the_record() -> None:
    config = algorithm(baseline={"kind": "deploy.examples.advantage:by_rank"})
    rewards_B = torch.tensor([3.0, float("nan"), 0.0, 1.0], dtype=torch.float64)
    group_B, lengths_B = torch.zeros(4).long(), torch.tensor([2, 3, 4, 5])
    prepared = Recipe(config, "none", 16).prepare(Rewarded(rewards_B, group_B, lengths_B, "v"))
    assert prepared.advantages_B.tolist() == [1.0, 0.0, -1.0, 0.0]
    assert prepared.trained_B.tolist() == [True, False, True, False]
    assert prepared.metrics == {"advantage/tied": 1 / 3}


def test_the_credit_rule_shares_by_entropy() -> None:
    """By hand: entropies 1, 3, 0 have mean 4/3; a completion without entropy is as under GRPO."""
    axis = PackedAxis(torch.tensor([3, 0, 2]))
    x_N = normal(5, random(0)).requires_grad_()
    entropy_N = torch.tensor([1.0, 3.0, 0.0, 0.0, 0.0])
    found = by_entropy(
        CreditInputs(x_N, x_N * 0, axis, entropy_N, None, x_N.detach(), x_N * 0),
        CreditConfig(kind=RULE),
    )
    torch.testing.assert_close(
        found.weight_N, torch.tensor([0.75, 2.25, 0.0, 1.0, 1.0], dtype=x_N.dtype)
    )
    assert found.log_ratio_N is x_N


def test_a_rule_of_ones_own_is_a_recipe_like_any_other() -> None:
    """Its loss is that of GRPO with each token's surrogate weighted by hand."""
    batch = random_batch(3, [5, 3, 4])
    config = algorithm(credit={"kind": RULE})
    recipe = Recipe(config, "none", 16)
    assert recipe.needs_entropy
    assert recipe.needs_prefix_counts
    assert recipe.shapes_credit
    expected, start = torch.zeros((), dtype=torch.float64), 0
    for i, length in enumerate(batch.lengths_B.tolist()):
        part = slice(start, start + length)
        mask = batch.loss_mask_N[part]
        ratio = (batch.logprobs_N - batch.old_logprobs_N)[part][mask].exp()
        advantage, entropy = batch.advantages_B[i], batch.entropy_N[part][mask]
        surrogate = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
        expected = (
            expected - batch.token_weights_B[i] * (surrogate * entropy / entropy.mean()).sum()
        )
        start += length
    found = recipe.loss(batch).loss
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found, policy_loss(batch, algorithm(), "none").loss)
