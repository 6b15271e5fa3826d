"""Every recipe trains ten steps on real parts: Ray, vLLM, FSDP. `make test-recipes`."""

from __future__ import annotations

import json
import math
from itertools import groupby
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from common.config.load import load_config
from common.config.sections import Config
from common.record.metrics import read_metrics
from common.record.trajectory_log import read_log
from deploy.launch import train_each
from deploy.models.warm_start import solution

CONFIGS = Path(__file__).resolve().parents[2] / "deploy" / "configs"
GUIDED = "g2rpo_a"
PLAIN = sorted(path.stem for path in (CONFIGS / "recipes").glob("*.yaml") if path.stem != GUIDED)
STEPS = 10

pytestmark = [pytest.mark.long, pytest.mark.timeout(2700)]


BRANCH, TREE = (f"algorithm.rollout.follow_up.{kind}" for kind in ("branch", "tree"))
TEACHER = ["teacher.path=builtin:tiny-chain-sum"]
FOLLOW_UP = "algorithm.rollout.follow_up"
RUBRIC = (
    "verifier.rules=[{name: rubric, args: {criteria: ["
    "{text: 'is {answer}', pattern: '(^|[= ]){answer}$', factual: true}, "
    "{text: 'has steps', pattern: ';'}]}}]"
)
SCAFFOLD = "algorithm.rollout.scaffold"
OVERRIDES = {
    "rgr_grpo": [
        RUBRIC,
        f"{FOLLOW_UP}.template='{{draft}} {{feedback}} {{prompt}}'",
        f"{FOLLOW_UP}.feedback_tokens=32",
    ],
    "ruscarl": [RUBRIC, f"{SCAFFOLD}.template='{{rubric}} {{prompt}}'", f"{SCAFFOLD}.midpoint=0.5"],
    "rc_grpo": [f"{SCAFFOLD}.template='{{tag}} {{prompt}}'"],
    "sgpo": [
        "verifier.rules=[{name: reasoning_gym, weight: 0}, "
        "{name: right_prefix, args: {first_wrong: sums}}]"
    ],
    "guide": ["algorithm.rollout.follow_up.hint=answer"],
    "igrpo": ["algorithm.rollout.follow_up.template='{draft} {prompt}'"],
    "spo_tree": [f"{TREE}.every=6", f"{TREE}.children=[2,2]"],
    "spo_chain": [f"{BRANCH}.samples=3", f"{BRANCH}.every=1"],
    "vineppo": [f"{BRANCH}.samples=3", f"{BRANCH}.separator='='"],
    "grpo_lambda_recent": ["algorithm.credit.normalize=none"],
    "grpo_opd": TEACHER,
    "opd": TEACHER,
    "sdpo": ["algorithm.advantage.context_template='{sibling} {prompt}'"],
    "vapo": ["algorithm.advantage.critic.pretrain_steps=2"],
}
"""The trace as the paper has it; the preset takes its preference for length away. The teacher is
the model before its training. Fifty steps of the critic alone are more than there are. There is no
solution to hint with. A model this small reads what stands last. Its
answers are short and sure, and have no lines."""


def config_of(recipe: str, runs: Path, *overrides: str) -> Config:
    keys = [f"recipe={recipe}", f"name={recipe}", f"runs_dir={runs}", f"steps={STEPS}"]
    keys += ["eval.every=0", "eval.prompts=16", "learner.credit_probe_every=5", *overrides]
    return load_config([CONFIGS / "tiny.yaml"], keys, CONFIGS / "recipes")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trains them all: recipes with one verifier share actors, the guided one has its own data."""
    folder = tmp_path_factory.mktemp("runs")
    configs = [config_of(recipe, folder, *OVERRIDES.get(recipe, ())) for recipe in PLAIN]
    configs.sort(key=lambda config: str(config.verifier))
    for _, alike in groupby(configs, key=lambda config: config.verifier):
        train_each(list(alike))
    sums = [f"{a} + {b} - {c}" for a in range(1, 6) for b in range(1, 6) for c in range(1, 5)]
    rows = [{"prompt": f"{s} =", "answer": eval(s), "solution": f" {solution(s)}"} for s in sums]
    data = folder / "sums.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    train_each(
        [
            config_of(
                GUIDED,
                folder,
                "data.source=file",
                f"data.path={data}",
                "data.solution_column=solution",
                "verifier.rules=[{name: math_answer, args: {extract: last_number}}]",
                "algorithm.rollout.guidance.max_tokens=8",
                # These sums are new to the warm model. At the preset's 1.5e-4 four of twelve runs
                # lost it within ten steps, and one of many left the guard's nat; at this, none.
                "learner.learning_rate=5e-5",
            )
        ]
    )
    return folder


def steps_of(runs: Path, recipe: str) -> list[dict[str, float]]:
    return [r for r in read_metrics(runs / recipe / "metrics.jsonl") if "grad_norm" in r]


def columns_of(runs: Path, recipe: str, *names: str) -> list[pa.Table]:
    """Columns of the logged groups, a table each, in the order of their dispatch."""
    groups = list(read_log(runs / recipe / "trajectories"))
    groups.sort(key=lambda group: group.column("group_id")[0].as_py())
    return [pa.Table.from_batches([group]).select(names) for group in groups]


@pytest.mark.parametrize("recipe", [*PLAIN, GUIDED])
def test_it_trains(runs: Path, recipe: str) -> None:
    config, steps = config_of(recipe, runs, *OVERRIDES.get(recipe, ())), steps_of(runs, recipe)
    assert [record["step"] for record in steps] == list(range(1, STEPS + 1))
    assert all(record["policy_version"] == record["step"] for record in steps)
    assert all(math.isfinite(record["grad_norm"]) for record in steps)
    # The norm is that of a step's last update, whose prompts may all be without a signal; and
    # pass_at_k has none where two answers are the best. A model that never read a draft or a tag is
    # rarely right behind one.
    seldom = (
        recipe in ("pass_at_k", "igrpo", "rc_grpo")
        or config.algorithm.objective.updates_per_batch > 1
    )
    least = STEPS // 2 if seldom else STEPS - 2
    assert sum(record["grad_norm"] > 0 for record in steps) >= least
    assert all(record["canary/gap"] < 1e-3 for record in steps)  # its weights reached vLLM
    assert all(record["staleness/max"] <= 1 for record in steps)


def test_what_each_paper_adds_is_in_the_numbers(runs: Path) -> None:
    grpo = steps_of(runs, "grpo")
    assert all("grad_norm/broadcast_credit" not in record for record in grpo)
    traced = steps_of(runs, "grpo_lambda_recent")
    assert all(record["credit/mean_weight"] > 2 for record in traced)
    probed = [record for record in traced if "grad_norm/broadcast_credit" in record]
    assert [record["step"] for record in probed] == [5, 10]
    assert all(
        record["grad_norm"] > 2 * record["grad_norm/broadcast_credit"] > 0 for record in probed
    )
    lambdas = [record["lambda_grpo/lambda"] for record in steps_of(runs, "lambda_grpo")]
    assert len(set(lambdas)) > 5
    assert all(record["guidance/length"] >= 1 for record in steps_of(runs, GUIDED))
    assert all(record["completions/drafts"] == 8 * 4 for record in steps_of(runs, "igrpo"))
    for recipe in ("spo_chain", "vineppo"):  # more than a branch at the start of each answer
        assert steps_of(runs, recipe)[0]["completions/probes"] > 1.5 * 64 * 3
    # Groups of 8 have grown, and most answers have 14 tokens. A step may have got the short ones.
    joined = [record["completions/joined"] for record in steps_of(runs, "spo_tree")]
    assert min(joined) > 0 and sum(joined) > 0.5 * 64 * STEPS
    generated = sum(r["tokens/generated"] for r in steps_of(runs, "cppo"))
    trained = sum(r["tokens/trained"] for r in steps_of(runs, "cppo"))
    assert trained <= 0.6 * generated
    for recipe, held in (("ppo", 0), ("vapo", 2)):
        steps = steps_of(runs, recipe)
        assert all(record["critic/grad_norm"] > 0 for record in steps)
        assert [record["learning_rate"] for record in steps[:3]].count(0) == held
        assert min(record["critic/loss"] for record in steps[5:]) < steps[0]["critic/loss"]
    dapo = steps_of(runs, "dapo")
    assert all(record["groups/equal_rewards"] == 0 for record in dapo)
    assert any(record["groups/equal_rewards"] > 0 for record in grpo)


def test_rubrics_and_prompts_of_their_own_are_in_the_log(runs: Path) -> None:
    for group in columns_of(runs, "rgr_grpo", "part", "sampled_behind", "feedback", "reward"):
        *first, last = group.to_pylist()
        assert [row["part"] for row in (*first, last)] == [""] * 7 + ["joins"]
        best = max(first, key=lambda row: row["reward"])
        # Where the best so far lacks nothing, the last is sampled as it was.
        assert bool(last["sampled_behind"]) == bool(best["feedback"])
        assert not any(row["sampled_behind"] for row in first)
    helped = pa.concat_tables(columns_of(runs, "rgr_grpo", "sampled_behind"))["sampled_behind"]
    assert pc.max(pc.list_value_length(helped)).as_py() > 13  # the longest prompt of the data
    shown = [
        pc.mean(pc.greater(pc.list_value_length(g["sampled_behind"]), 0).cast("float64")).as_py()
        for g in columns_of(runs, "ruscarl", "sampled_behind")
    ]
    # The last two of a group read no rubric: their share of two criteria is less than half of one.
    assert max(shown[:8]) == 6 / 8 and shown[-8:] == [0.0] * 8
    for group in columns_of(runs, "rc_grpo", "prompt_ids")[:20]:
        assert len({tuple(ids) for ids in group["prompt_ids"].to_pylist()}) in (1, 2)
    earned = pa.concat_tables(columns_of(runs, "sgpo", "reward", "accuracy"))
    wrong = earned.filter(pc.equal(earned["accuracy"], 0.0))["reward"].to_numpy()
    assert 0 < wrong.min() < 0.1 and wrong.max() < 1 and len(np.unique(wrong)) > 3
