"""Which rule's credit points at the tokens that matter: `make credit-study`.

    python tests/bench/credit_study.py

Three tasks are built so that the truth is known exactly (`credit_tasks.py`): the first, a middle,
or the last of eight letters decides. A fourth is that of the tiny preset, where values are measured
by branches (`grpo-lambda credit`), at the first step and after some training. Each rule credits the
completions of one and the same step. A pretrained model (SmolLM2-135M-Instruct) is measured in the
same way on sums and on episodes with a calculator, under fewer rules. Held against the truth are:

    rank      Spearman's correlation of a rule's credit of tokens or segments with the true one
    sign      share of those where both have a sign, and the same
    gradient  cosine of the rule's gradient with that of the true credit

Then the measured agreement on the tiny preset is held against who learned fastest on it in
`make compare` (`recipes.json`, `teachers.json`). Writes `credit-study.md`, `.json` and `.png`.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from credit_tasks import LENGTH, PLACES, Chain, build, letter_ids
from harness import CONFIGS, RESULTS, ROOT

from common.config.sections import Config
from deploy.credit.agreement import Agreement, agreement, credit_of_segments, rank_correlation
from deploy.credit.completions import chosen, policy_version
from deploy.credit.gradient import Directions, directions
from deploy.credit.launch import Options, measure
from deploy.credit.measured import Measured
from deploy.eval.metrics import Estimate
from deploy.inspector.replay import other_rule, replay, run_config, step_batches
from deploy.launch import train
from deploy.models.tiny_model import build_tokenizer
from deploy.placement.options import with_compute_dtype

mpl.use("Agg")
import matplotlib.pyplot as plt

RECIPES = CONFIGS / "recipes"
RULES: Mapping[str, str] = {
    "GRPO": "grpo",
    "Dr. GRPO": "dr_grpo",
    "GRPO-λ recent": "grpo_lambda_recent",
    "GRPO-λ both": "grpo_lambda_both",
    "terminal trace": "grpo_lambda_terminal",
    "selective traces": "grpo_lambda_entropy_mask",
    "S-trace-like": "s_trace_like",
    "λ-GRPO, prefix sets": "lambda_grpo_prefix",
    "80/20": "top_entropy",
    "AR": "ar",
    "TR-GRPO": "tr_grpo",
    "TEMPO": "tempo",
    "KTAE": "ktae",
} | {
    f"trace, no clamp, λ = {value:g}": "grpo_lambda_recent,algorithm.baseline.min_advantage=null,"
    f"algorithm.credit.lambda_={value:g}"
    for value in (0.0, 0.5, 0.9, 0.99)
}
"""Recipes, and keys of their own, by label. GRPO-λ's have λ = 0.99 and clamp low advantages."""
PRETRAINED = (
    "GRPO",
    "GRPO-λ recent",
    "terminal trace",
    "TEMPO",
    "KTAE",
    "trace, no clamp, λ = 0.9",
    "trace, no clamp, λ = 0.99",
)
"""Rules that the pretrained model is measured under: a gradient of it takes a second."""
LEARNED = {
    "GRPO": ("recipes", "GRPO"),
    "Dr. GRPO": ("recipes", "Dr. GRPO"),
    "GRPO-λ recent": ("recipes", "GRPO-λ recent ε-trace"),
    "GRPO-λ both": ("recipes", "GRPO-λ both ε-trace"),
    "terminal trace": ("recipes", "terminal trace (ablation)"),
    "selective traces": ("recipes", "selective traces"),
    "λ-GRPO, prefix sets": ("recipes", "λ-GRPO, prefix sets (2509.21154)"),
    "TEMPO": ("teachers", "TEMPO"),
    "KTAE": ("teachers", "KTAE"),
}
"""Table and row of `make compare` by rule. Both tables are of the task of the tiny preset."""


@dataclass(frozen=True)
class Found:
    """One rule on one task."""

    rank: Estimate
    sign: Estimate
    gradient: Estimate

    @classmethod
    def of(cls, agreed: Agreement, way: Directions) -> Found:
        return cls(agreed.rank, agreed.sign, way.cosine)


Task = dict[str, Found]
"""By rule."""
Measures = tuple[Task, Estimate]
"""What was found, and the rank correlation that the noise of its branches allows."""


def rules_of(run: Path) -> dict[str, tuple[str, Config]]:
    """Name and configuration of every rule."""
    return {
        label: other_rule(run, f"recipe={rule}".split(","), RECIPES)
        for label, rule in RULES.items()
    }


def trained(name: str, runs: Path, keys: Mapping[str, Any], preset: str = "tiny") -> Path:
    """A synchronous run of GRPO; one that is there is taken as it is."""
    run = runs / name
    if not (run / "checkpoints" / f"step-{keys['steps']}").is_dir():
        shutil.rmtree(run, ignore_errors=True)
        shared = {"generator.max_staleness": 0, "eval.every": 0, "runs_dir": runs, "name": name}
        train(CONFIGS / f"{preset}.yaml", recipe="grpo", **shared, **keys)
    return run


def exact(task: str, runs: Path) -> Task:
    """The rules on a task whose truth is known."""
    folder, place = runs / "letters", PLACES[task]
    model = build(folder)
    rule = f"[{{name: credit_tasks:decided_by, args: {{place: {place}}}}}]"
    run = trained(
        f"letters-{task}",
        runs,
        {
            "steps": 1,
            "model.path": folder,
            "verifier.rules": rule,
            "generator.max_completion_tokens": LENGTH,
            "eval.prompts": 1,
            "batch.group_size": 16,
        },
    )
    groups = step_batches(run, range(1, 2))[1]
    chain = Chain(model, letter_ids(build_tokenizer()))
    completions = chosen(groups, policy_version(groups), 32)
    measured = []
    for each in completions:
        values = chain.values(list(each.prompt.token_ids), list(each.token_ids), place)
        points = tuple(range(len(values)))
        sure = tuple((value, value) for value in values)
        measured.append(Measured(points, len(values), each.reward, sure, (0.0, 1.0)))
    by_key = {each.key: one for each, one in zip(completions, measured, strict=True)}
    others = rules_of(run)
    judged = replay(run, 1, *others.values()).others
    rules = {
        label: (config, found.credit)
        for (label, (_, config)), found in zip(others.items(), judged, strict=True)
    }
    ways = directions(with_compute_dtype(run_config(run)), None, groups, by_key, rules)
    return {
        label: Found.of(agreement(_credits(table, completions, measured), measured), ways[label])
        for label, (_, table) in rules.items()
    }


def _credits(table: Any, completions: Sequence[Any], measured: Sequence[Measured]) -> list[Any]:
    rows = {(r["group_id"], r["completion_index"]): r["advantages"] for r in table.to_pylist()}
    return [
        credit_of_segments(
            None if rows[one.key] is None else np.array(rows[one.key], np.float64), each
        )
        for one, each in zip(completions, measured, strict=True)
    ]


def sums(step: int, runs: Path) -> Measures:
    """The rules on the tiny preset, by branches."""
    keys = {"eval.prompts": 8, "checkpoint.every": 10, "steps": 20}
    run = trained("sums", runs, keys)
    return by_branches(
        Options(run, step, at=("every:2",), completions=16, continuations=16, samples=20_000), RULES
    )


def pretrained(preset: str, at: str, runs: Path) -> Measures:
    """Some of the rules on the first step of a pretrained model, by branches."""
    run = trained(preset, runs, {"eval.prompts": 4, "steps": 1}, preset)
    rules = {label: RULES[label] for label in PRETRAINED}
    options = Options(run, 1, at=(at,), completions=16, continuations=16, samples=20_000)
    return by_branches(options, rules)


def by_branches(options: Options, rules: Mapping[str, str]) -> Measures:
    """Agreement with values that branches measure; also the rank that the noise allows."""
    found = measure(replace(options, recipes=list(rules.values())))
    return {
        label: Found.of(found.rules[recipe], found.directions[recipe])
        for label, recipe in rules.items()
    }, found.ceiling


def against_learning(task: Task) -> tuple[float, float, int]:
    """Rank correlation over rules: agreement, and cosine, with what a rule learns faster than GRPO.

    That is its area under the training curve less that of GRPO in the same table.
    """

    def area(name: str, label: str) -> float:
        outcomes = json.loads((RESULTS / f"{name}.json").read_text())
        return float(np.mean([np.mean(e["curve"]) for e in outcomes if e["label"] == label]))

    areas = {
        rule: area(name, label) - area(name, "GRPO") for rule, (name, label) in LEARNED.items()
    }
    order = [rule for rule in areas if rule in task]
    learned = np.array([areas[rule] for rule in order])
    rank, cosine = (
        rank_correlation(np.array([getattr(task[r], name).value for r in order]), learned)
        for name in ("rank", "gradient")
    )
    return rank, cosine, len(order)


def _cell(estimate: Estimate) -> str:
    if math.isnan(estimate.value):
        return "–"
    if math.isnan(estimate.low):
        return f"{estimate.value:.2f}"
    return f"{estimate.value:.2f} [{estimate.low:.2f}, {estimate.high:.2f}]"


def table(tasks: Mapping[str, Task], quantity: str) -> list[str]:
    """One quantity, rules by tasks."""
    lines = ["| credit of | " + " | ".join(tasks) + " |", "|" + "---|" * (len(tasks) + 1)]
    labels = dict.fromkeys(label for task in tasks.values() for label in task)
    for label in labels:
        cells = [_cell(getattr(t[label], quantity)) if label in t else "–" for t in tasks.values()]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return lines


def plot(tasks: Mapping[str, Task]) -> None:
    """Cosine of each rule on each task, with its interval."""
    figure, axes = plt.subplots(
        1, len(tasks), figsize=(3.1 * len(tasks), 4.6), sharey=True, layout="constrained"
    )
    labels = list(RULES)
    for axis, (name, task) in zip(axes, tasks.items(), strict=True):
        places = [-labels.index(label) for label in task]
        found = [each.gradient for each in task.values()]
        values = np.array([each.value for each in found])
        errors = np.abs(np.array([[e.value - e.low, e.high - e.value] for e in found]).T)
        axis.errorbar(values, places, xerr=errors, fmt="o", color="#0f766e", markersize=4)
        axis.axvline(0, color="#9ca3af", linewidth=0.8)
        axis.set_title(name, fontsize=9)
        axis.set_yticks(-np.arange(len(labels)), labels, fontsize=8)
        axis.grid(alpha=0.3)
        axis.set_xlim(-1.05, 1.05)
    figure.supxlabel("cosine of a rule's gradient with that of the true credit", fontsize=9)
    figure.savefig(RESULTS / "credit-study.png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "credit-study")
    runs = parser.parse_args().runs
    tasks = {f"{name} letter": exact(name, runs) for name in PLACES}
    ceilings = {}
    for step in (1, 20):
        label = f"sums, step {step}"
        tasks[label], ceilings[label] = sums(step, runs)
    for label, preset, at in (
        ("SmolLM2, sums", "smollm2", "every:4"),
        ("SmolLM2, calculator", "smollm2-calculator", "every:6"),
    ):
        tasks[label], ceilings[label] = pretrained(preset, at, runs)
    lines = ["`make credit-study`", ""]
    for quantity, title in (
        ("gradient", "Cosine of the gradient with that of the true credit"),
        ("rank", "Rank correlation of credit and truth, over tokens or segments"),
        ("sign", "Share of tokens or segments with the sign of the truth"),
    ):
        lines += [f"{title}; 95 % intervals over completions.", "", *table(tasks, quantity), ""]
    for label, ceiling in ceilings.items():
        said = f"{label}: the noise allows a rank correlation of {_cell(ceiling)}."
        if label.startswith("sums"):
            rank, cosine, count = against_learning(tasks[label])
            said += (
                f" Over {count} rules what a rule learns faster than GRPO in `make compare` has a "
                f"rank correlation of {rank:.2f} with the agreement, of {cosine:.2f} with the "
                "cosine."
            )
        lines += [said, ""]
    (RESULTS / "credit-study.md").write_text("\n".join(lines))
    record = {name: {r: asdict(f) for r, f in task.items()} for name, task in tasks.items()}
    text = json.dumps(record, indent=0, ensure_ascii=False).replace("NaN", "null")
    (RESULTS / "credit-study.json").write_text(text + "\n")
    plot(tasks)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
