"""Recipes against each other on the tiny preset: as many trained groups, several seeds.

    python tests/bench/compare.py recipes staleness guidance --seeds 5

Every run is a real one (Ray, vLLM, FSDP); the runs of a table share their generators. A finished
run is not run again. Each table becomes `NAME.md`, `NAME.json` and `NAME.png` in `--out`:
held-out accuracy after training and the area under the training curve (mean accuracy of the
completions that were trained on, over all steps), means over seeds with 95 % bootstrap intervals.
Every step trains on as many groups; a recipe that filters samples more, which `sampled` shows, and
sees itself in its curve only what it kept. G2RPO-A's curve counts guided completions too: compare
those rows by their held-out accuracy, which no guidance touches.

With one optimiser step a batch, as in `recipes`, the policy is the old one at every step: no clip
binds, and ε-trace and ε-weight differ only in where the off-policy correction stands (S = 1).
`epochs` trains twice on every batch. `staleness` compares plain and cut traces on the advantage,
where the correction belongs to the token it weighs (`learner/algorithm/traces.py`).

The task: an answer of the tiny preset is either worked out in steps or blurted, which its first
tokens decide, and only the number at its end is paid for. A rule that moves credit towards early
tokens has something to gain here. `guidance` asks for sums of five digits, where the warm start
has seen only three: without help almost no completion is right.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from curves import plot
from harness import CONFIGS, RESULTS, ROOT

from common.config.load import dump_config, load_config
from common.config.sections import Config
from common.record.metrics import read_metrics
from common.record.trajectory_log import read_log
from deploy.launch import train_each
from deploy.models.warm_start import solution


@dataclass(frozen=True)
class Row:
    """One line of a table: a recipe and what differs from it."""

    label: str
    recipe: str
    overrides: tuple[str, ...] = ()


def rows_of(table: str, runs: Path) -> list[Row]:
    """The rows of `table`. Raises `SystemExit` for an unknown one."""
    if table == "recipes":
        return [*_baselines(), *_traces(), *_beyond()]
    if table == "staleness":
        return [
            Row(f"{label}, S = {staleness}", recipe, (f"generator.max_staleness={staleness}",))
            for staleness in (0, 2, 8)
            for label, recipe in (
                ("plain traces", "grpo_lambda_recent_weight"),
                ("cut traces", "grpo_lambda_cut"),
            )
        ]
    if table == "epochs":
        return _two_epochs()
    if table == "guidance":
        task = _hard_task(runs / "five-digits.jsonl")
        guided = "algorithm.rollout.guidance"
        return [
            Row("GRPO", "grpo", task),
            Row(
                "G2RPO-A, 1/4 guided",
                "g2rpo_a",
                (*task, f"{guided}.max_tokens=24"),
            ),
            Row(
                "G2RPO-A, 3/4 guided",
                "g2rpo_a",
                (*task, f"{guided}.max_tokens=24", f"{guided}.ratio=0.75"),
            ),
        ]
    raise SystemExit(f"no table {table!r}: use recipes, epochs, staleness or guidance")


def _baselines() -> list[Row]:
    # Nearly all right answers take 13 to 17 of 24 tokens: far from the punishment.
    window = (f"algorithm.rollout.overlong_penalty_share={2 / 24}",)
    return [
        Row("GRPO", "grpo"),
        Row("Dr. GRPO", "dr_grpo"),
        Row("DAPO", "dapo", window),
    ]


def _lambda_recipes() -> dict[str, str]:
    """GRPO-lambda: the trace's two shapes, inside the ratio or as a weight; recipes by label."""
    return {
        f"GRPO-λ {shape} {application}": f"grpo_lambda_{shape}{name}"
        for shape in ("recent", "both")
        for application, name in (("ε-trace", ""), ("ε-weight", "_weight"))
    }


def _traces() -> list[Row]:
    """GRPO-lambda, clamp on or off."""
    unclamped = ("algorithm.baseline.min_advantage=null",)
    return [
        Row(f"{label}{suffix}", recipe, overrides)
        for label, recipe in _lambda_recipes().items()
        for suffix, overrides in (("", ()), (", no clamp", unclamped))
    ]


def _two_epochs() -> list[Row]:
    """Where inside and outside the ratio are two things: see the module."""
    twice = ("algorithm.objective.epochs=2",)
    recipes = {"GRPO": "grpo"} | _lambda_recipes()
    return [Row(f"{label}, two epochs", recipe, twice) for label, recipe in recipes.items()]


def _beyond() -> list[Row]:
    return [
        Row("λ-GRPO (2510.06870)", "lambda_grpo"),
        Row("λ-GRPO, prefix sets (2509.21154)", "lambda_grpo_prefix"),
        Row("selective traces", "grpo_lambda_selective"),
        Row("terminal trace (ablation)", "grpo_lambda_terminal"),
        # What else the recipe of GRPO-lambda brings, and whether one rate suits both.
        Row("GRPO, advantages clamped", "grpo", ("algorithm.baseline.min_advantage=-0.1",)),
        Row("GRPO, twice the learning rate", "grpo", ("learner.learning_rate=3.0e-4",)),
    ]


def _hard_task(path: Path) -> tuple[str, ...]:
    """Sums of five digits with worked solutions, as a file; the keys that train on it."""
    draw = random.Random(0)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        for _ in range(2500):
            terms = [str(draw.randint(0, 9)) for _ in range(5)]
            expression = terms[0] + "".join(f" {draw.choice('+-')} {t}" for t in terms[1:])
            worked = solution(expression)
            row = {
                "prompt": f"State the final answer to the following arithmetic problem: "
                f"{expression} =",
                "answer": worked.rpartition("=")[2],
                "solution": f" {worked}",
            }
            file.write(json.dumps(row) + "\n")
    return (
        "data.source=file",
        f"data.path={path}",
        "data.solution_column=solution",
        "verifier.rules=[{name: math_answer, args: {extract: last_number}}]",
        "generator.max_completion_tokens=40",
    )


@dataclass(frozen=True)
class Outcome:
    """One finished run; accuracies are shares."""

    label: str
    seed: int
    before: float
    after: float
    curve: list[float]
    length: float
    sampled: float
    """Groups sampled for every group trained on."""
    grad_ratio: float | None
    """Gradient norm over that of broadcast credit on the same batch, median; None for those."""

    @property
    def area(self) -> float:
        return float(np.mean(self.curve))


def config_of(table: str, row: Row, seed: int, runs: Path, more: list[str]) -> Config:
    """The configuration of one run."""
    slug = "".join(letter if letter.isalnum() else "-" for letter in row.label)
    return load_config(
        [CONFIGS / "tiny.yaml"],
        [
            f"recipe={row.recipe}",
            f"seed={seed}",
            f"runs_dir={runs}",
            f"name={table}-{slug}-{seed}",
            "eval.every=0",
            "eval.prompts=400",
            *row.overrides,
            *more,
        ],
        CONFIGS / "recipes",
    )


def folder_of(config: Config) -> Path:
    return Path(config.runs_dir) / str(config.name)


def is_finished(config: Config) -> bool:
    """With this very configuration: a recipe that has changed since is run again."""
    folder = folder_of(config)
    if not (folder / "checkpoints" / f"step-{config.steps}").is_dir():
        return False
    return (folder / "config.yaml").read_text() == dump_config(config)


def outcome(row: Row, config: Config) -> Outcome:
    """Sum a finished run up from its metrics."""
    records = read_metrics(folder_of(config) / "metrics.jsonl")
    steps = [record for record in records if "reward/accuracy" in record]
    probed = [r for r in steps if r.get("grad_norm/broadcast_credit")]
    ratios = [r["grad_norm"] / r["grad_norm/broadcast_credit"] for r in probed]
    return Outcome(
        label=row.label,
        seed=config.seed,
        before=records[0]["eval/accuracy"],
        after=records[-1]["eval/accuracy"],
        curve=[record["reward/accuracy"] for record in steps],
        length=float(np.mean([r["completion_length/mean"] for r in steps[-10:]])),
        sampled=sum(1 for _ in read_log(folder_of(config) / "trajectories"))
        / (config.steps * config.groups_per_step),
        grad_ratio=float(np.median(ratios)) if ratios else None,
    )


def interval(values: list[float], draws: int = 10_000) -> tuple[float, float, float]:
    """Mean and 95 % bootstrap interval over seeds."""
    data = np.array(values)
    resampled = np.random.default_rng(0).choice(data, (draws, len(data))).mean(axis=1)
    low, high = np.percentile(resampled, [2.5, 97.5])
    return float(data.mean()), float(low), float(high)


def markdown(rows: list[Row], outcomes: list[Outcome]) -> str:
    """The table, rows in their own order."""
    lines = [
        "| recipe | seeds | held-out accuracy, % | area under the training curve, % "
        "| tokens an answer at the end | sampled | gradient norm against broadcast credit |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        mine = [each for each in outcomes if each.label == row.label]
        if not mine:
            continue
        after = interval([100 * each.after for each in mine])
        area = interval([100 * each.area for each in mine])
        ratios = [each.grad_ratio for each in mine if each.grad_ratio is not None]
        lines.append(
            f"| {row.label} | {len(mine)} | {after[0]:.1f} [{after[1]:.1f}, {after[2]:.1f}] "
            f"| {area[0]:.1f} [{area[1]:.1f}, {area[2]:.1f}] "
            f"| {np.mean([each.length for each in mine]):.1f} "
            f"| {np.mean([each.sampled for each in mine]):.2f} "
            f"| {f'{np.median(ratios):.1f}' if ratios else '1'} |"
        )
    return "\n".join(lines)


def on_record(table: str, out: Path) -> dict[tuple[str, int], Outcome]:
    """Outcomes of an earlier call, by row and seed."""
    path = out / f"{table}.json"
    outcomes = [Outcome(**each) for each in json.loads(path.read_text())] if path.is_file() else []
    return {(each.label, each.seed): each for each in outcomes}


def write(table: str, rows: list[Row], outcomes: list[Outcome], out: Path) -> None:
    """Table, data and plot of what is finished."""
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{table}.json").write_text(
        json.dumps([asdict(each) for each in outcomes], indent=0) + "\n"
    )
    command = " ".join(["python tests/bench/compare.py", *sys.argv[1:]])
    before = interval([100 * each.before for each in outcomes])[0]
    (out / f"{table}.md").write_text(
        f"`{command}`\n\nHeld-out accuracy before training: {before:.1f} %. "
        f"Means over seeds, 95 % bootstrap intervals in brackets.\n\n{markdown(rows, outcomes)}\n"
    )
    plot(
        {row.label: [e.curve for e in outcomes if e.label == row.label] for row in rows}, out, table
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tables", nargs="+", help="recipes, epochs, staleness, guidance; key=value")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--rows", nargs="+", default=[], help="labels; default: all of a table")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "compare")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--keep", action="store_true", help="what --out has on record is not run")
    options = parser.parse_args()
    more = [word for word in options.tables if "=" in word]
    for table in [word for word in options.tables if "=" not in word]:
        rows = rows_of(table, options.runs)
        rows = [row for row in rows if not options.rows or row.label in options.rows]
        # All rows of a seed first: an early table already compares them.
        jobs = [
            (row, config_of(table, row, seed, options.runs, more))
            for seed in range(options.seeds)
            for row in rows
        ]
        kept = on_record(table, options.out) if options.keep else {}
        jobs = [(row, config) for row, config in jobs if (row.label, config.seed) not in kept]
        missing = [config for _, config in jobs if not is_finished(config)]
        for config in missing:
            shutil.rmtree(folder_of(config), ignore_errors=True)  # begun and not finished
        try:
            if missing:
                train_each(missing)
        finally:
            done = [outcome(row, config) for row, config in jobs if is_finished(config)]
            done = [*kept.values(), *done]
            if done:
                write(table, rows, done, options.out)
                print(markdown(rows, done))


if __name__ == "__main__":
    main()
