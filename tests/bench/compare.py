"""Recipes against each other on the tiny preset: equal rollout budgets, several seeds.

    python tests/bench/compare.py --recipes grpo grpo_lambda_recent --seeds 5

Every run is `grpo-lambda train` in a process of its own; a finished one is not run again. Writes
`compare.json` and `compare.md` into `--out`: final held-out accuracy and the area under the
training curve (mean reward over all steps), each a mean over seeds with a 95 % bootstrap interval.

Why this task: an answer of the tiny preset is either worked out in steps or blurted, which its
first token decides, and only the number at its end is paid for. A rule that moves credit towards
early tokens has something to gain here.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "deploy" / "configs" / "tiny.yaml"
RUN_TIMEOUT_S = 900


@dataclass(frozen=True)
class Outcome:
    """One finished run."""

    recipe: str
    seed: int
    before: float
    after: float
    area: float
    seconds: float


def run(recipe: str, seed: int, runs: Path, overrides: list[str]) -> Outcome:
    """Train, unless this run is finished already; raises `CalledProcessError` when it fails."""
    folder = runs / f"{recipe}-{seed}"
    if not (folder / "checkpoints").is_dir():
        if folder.exists():
            raise SystemExit(f"{folder} is an unfinished run: remove it and start again")
        subprocess.run(
            [
                *(sys.executable, "-m", "deploy.cli", "train", "--config", str(TINY)),
                *(f"recipe={recipe}", f"seed={seed}", f"runs_dir={runs}", f"name={folder.name}"),
                *overrides,
            ],
            cwd=ROOT,
            check=True,
            timeout=RUN_TIMEOUT_S,
            stdout=subprocess.DEVNULL,
        )
    return outcome(recipe, seed, folder)


def outcome(recipe: str, seed: int, folder: Path) -> Outcome:
    """Sum a finished run up from its metrics."""
    records = read_metrics(folder / "metrics.jsonl")
    steps = [record for record in records if "reward/mean" in record]
    return Outcome(
        recipe=recipe,
        seed=seed,
        before=records[0]["eval/accuracy"],
        after=records[-1]["eval/accuracy"],
        area=float(np.mean([record["reward/mean"] for record in steps])),
        seconds=float(sum(record["time/step"] for record in steps)),
    )


def interval(values: list[float], draws: int = 10_000) -> tuple[float, float, float]:
    """Mean and 95 % bootstrap interval over seeds."""
    data = np.array(values)
    resampled = np.random.default_rng(0).choice(data, (draws, len(data))).mean(axis=1)
    low, high = np.percentile(resampled, [2.5, 97.5])
    return float(data.mean()), float(low), float(high)


def table(outcomes: list[Outcome]) -> str:
    """Markdown, best final accuracy first."""
    rows = []
    for recipe in sorted({each.recipe for each in outcomes}):
        mine = [each for each in outcomes if each.recipe == recipe]
        after, area = (
            interval([each.after for each in mine]),
            interval([each.area for each in mine]),
        )
        rows.append((after[0], recipe, len(mine), after, area))
    lines = [
        "| recipe | seeds | held-out accuracy, % | mean training reward |",
        "|---|---|---|---|",
    ]
    for _, recipe, seeds, after, area in sorted(rows, reverse=True):
        accuracy = "{:.1f} [{:.1f}, {:.1f}]".format(*(100 * value for value in after))
        reward = "{:.3f} [{:.3f}, {:.3f}]".format(*area)
        lines.append(f"| {recipe} | {seeds} | {accuracy} | {reward} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipes", nargs="+", required=True)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "compare")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_args()
    outcomes = []
    for seed in range(options.seeds):  # all recipes of a seed first: a table can be made early
        for recipe in options.recipes:
            outcomes.append(run(recipe, seed, options.runs, options.overrides))
            print(outcomes[-1], flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    records = [vars(each) for each in outcomes]
    (options.out / "compare.json").write_text(json.dumps(records, indent=1) + "\n")
    command = " ".join(["python tests/bench/compare.py", *sys.argv[1:]])
    start = interval([each.before for each in outcomes])[0]
    (options.out / "compare.md").write_text(
        f"`{command}`\n\nHeld-out accuracy before training: {100 * start:.1f} %. "
        f"Mean over seeds, 95 % bootstrap interval in brackets.\n\n{table(outcomes)}\n"
    )
    print(table(outcomes))


if __name__ == "__main__":
    main()
