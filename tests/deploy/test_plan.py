"""`grpo-lambda plan`: works for every preset and recipe, and says where each value came from."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.config.load import load_config
from deploy.cli import main
from deploy.command.presets import CONFIGS, RECIPES, load
from deploy.predict import cluster_plan
from deploy.run.settled import settled

PRESETS = sorted(CONFIGS.glob("*.yaml"))
NAMES = sorted(path.stem for path in RECIPES.glob("*.yaml"))
TINY = CONFIGS / "tiny.yaml"


def plan(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    status = main(["plan", *words])
    printed = capsys.readouterr()
    assert (status, printed.err) == (0, "")
    return printed.out


def configuration(text: str) -> str:
    """The part of a plan that is YAML."""
    return text.partition("\n# Data")[0]


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_every_preset_is_planned(
    path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(cluster_plan, "_STEPS", 10)  # of the simulation; 64 devices take long
    text = plan(capsys, "--config", str(path))
    assert "# Batch arithmetic" in text
    assert ("# Predicted step" in text) == (
        path.stem not in ("tiny", "tiny-guess", "smollm2", "smollm2-calculator")
    )
    written = tmp_path / "planned.yaml"
    written.write_text(configuration(text))  # with its comments
    planned, config = load_config([written], [], resolved=True), settled(load(path, []), print)
    assert planned.model.dtype in ("bfloat16", "float32")
    config.model.dtype = planned.model.dtype
    assert planned == config


def test_a_plan_says_where_episodes_are_played(capsys: pytest.CaptureFixture[str]) -> None:
    guess = ("--config", str(TINY.with_name("tiny-guess.yaml")))
    assert "guess: 1 process(es) beside each generator" in plan(capsys, *guess)
    pool = ("placement=actors", "workers=3", "resources={cpu_node: 1}", "labels={kind: cpu}")
    text = plan(capsys, *guess, *(f"environment.{key}" for key in pool))
    assert "guess: 3 actor(s), each CPU 1, cpu_node 1, on nodes with kind=cpu" in text


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_is_planned(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    teacher = "teacher.path=builtin:tiny-chain-sum"
    hint = "algorithm.rollout.follow_up.hint=answer"
    rubric = "verifier.rules=[{name: rubric, args: {criteria: [{text: a, pattern: b}]}}]"
    steps = "verifier.rules=[{name: right_prefix, args: {first_wrong: sums}}]"
    needs = {
        "guide": [hint],
        "opd": [teacher],
        "grpo_opd": [teacher],
        "rgr_grpo": [rubric, "model.max_length=512"],
        "ruscarl": [rubric],
        "sgpo": [steps],
        "spo_tree": ["algorithm.rollout.follow_up.tree.every=6"],
    }
    text = plan(capsys, "--config", str(TINY), f"recipe={name}", *needs.get(name, []))
    assert f"recipe: {name}  # " in text
    # Theirs are defaults, and SGPO's rule is given here.
    assert name in ("grpo", "lambda_grpo", "sgpo") or f"  # recipe {name}" in text


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rgr_grpo", "shows what rules say that an answer lacks"),
        ("ruscarl", "shows criteria of verifier.rules"),
        ("sgpo", "who finds the first wrong step"),
    ],
)
def test_a_recipe_that_needs_a_rule_of_yours_is_refused_without(
    name: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "--config", str(TINY), f"recipe={name}"]) == 2
    assert message in capsys.readouterr().err


def test_a_plan_counts_the_leaves_of_trees(capsys: pytest.CaptureFixture[str]) -> None:
    tree = "algorithm.rollout.follow_up.tree"
    keys = ("--config", str(TINY), "recipe=spo_tree", f"{tree}.children=[3,2]")
    text = plan(capsys, *keys, f"{tree}.every=6")
    assert "8 prompts x 48 completions = 384 at most: batch.prompts_per_step x " in text
    assert "16 groups x 48 = 768 completions at most" in text
    assert "has a group ask 2 time(s) for more" in text
    assert "no node there splits" not in text
    text = plan(capsys, *keys, f"{tree}.every=12")
    assert "the last 1 of 2 levels would begin behind" in text


def test_a_plan_says_where_each_value_came_from(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text(
        TINY.read_text().replace("algorithm:\n", "algorithm:\n  objective: {epochs: 2}\n")
    )
    keys = ("recipe=dapo", "algorithm.objective.clip_low=0.1", "data.plain_template=one\n{prompt}")
    lines = plan(capsys, "--config", str(mine), *keys).splitlines()
    for line in (
        "    clip_high: 0.28  # recipe dapo",
        f"    epochs: 2  # file {mine}",
        f"    params:  # file {mine}",
        "    clip_low: 0.1  # command line",
        "    kl: 0.0",
    ):
        assert line in lines
    (text,) = (line for line in lines if line.endswith("{prompt}'  # command line"))
    assert text.strip() != "{prompt}'"  # behind the last line of text that goes over several


def test_a_data_type_that_the_machine_decides_is_said_so(
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = plan(capsys, "--config", str(CONFIGS / "smollm2.yaml"))
    assert "  # auto, for the devices" in text


def test_a_plan_for_cpus_says_what_adapters_train_and_save(
    capsys: pytest.CaptureFixture[str],
) -> None:
    keys = ("--config", str(TINY))
    assert "adapters" not in plan(capsys, *keys).partition("# Placement")[2]
    output = plan(capsys, *keys, "model.adapter.rank=8")
    assert "trained                0.08 of 0.9 million parameters" in output
    assert "learner's memory" in output
    merged, alone = (
        plan(capsys, *keys, "model.adapter.rank=8", "model.dtype=float32", f"weights.publish={way}")
        for way in ("merged", "adapter")
    )
    assert "published              all weights, adapters merged: 3.4 MB a version" in merged
    assert "published              the adapters alone, 0.3 MB a version" in alone
    assert "learner.learning_rate=0.00015 looks like that" in output
    named = plan(capsys, *keys, "model.adapter.rank=8", "model.adapter.targets=qkv_proj")
    assert "adapters of rank 8, not counted: model.adapter.targets: a plan knows q_proj" in named
