"""Recipes against each other on the tiny preset: as many trained groups, several seeds.

    python tests/bench/compare.py recipes staleness guidance --seeds 5

Every run is a real one (Ray, vLLM, FSDP); the runs of a table share their generators. A finished
run is not run again; SIGTERM saves the run under way and ends. Each table becomes `NAME.md`,
`NAME.json` and `NAME.png` in `--out`: held-out accuracy after training and the area under the
training curve (mean accuracy of the completions that were trained on, over all steps), means over
seeds with 95 % bootstrap intervals.
Every step trains on as many groups; a recipe that filters samples more, which `sampled` shows, and
sees itself in its curve only what it kept. G2RPO-A's curve counts guided completions too: compare
those rows by their held-out accuracy, which no guidance touches.
The tables are those of `compare_tables.py`, which says what each of them asks.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from asyncio import CancelledError
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from compare_tables import TABLES, Row, rows_of
from curves import plot
from harness import CONFIGS, RESULTS, ROOT

from common.config.load import dump_config, load_config
from common.config.sections import Config
from common.record.metrics import read_metrics
from common.record.trajectory_log import read_log
from deploy.launch import train_each
from deploy.run.lifetime import found
from deploy.run.settled import settled

_REST = "| tokens an answer at the end | sampled | gradient norm against broadcast credit |"
_STOPPED = 143
"""The exit status of a program that SIGTERM has ended."""


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
    tokens: list[float] = field(default_factory=list)
    """Tokens sampled for each step, probes included; empty in older files."""

    @property
    def area(self) -> float:
        return float(np.mean(self.curve))

    def area_within(self, budget: float) -> float:
        """Area under the curve over the tokens sampled, until these are `budget`."""
        left = np.clip(budget - np.cumsum([0.0, *self.tokens[:-1]]), 0.0, self.tokens)
        return float(np.dot(self.curve, left) / left.sum())


def config_of(table: str, row: Row, seed: int, runs: Path, more: list[str]) -> Config:
    """The configuration of one run."""
    slug = "".join(letter if letter.isalnum() else "-" for letter in row.label)
    return load_config(
        [CONFIGS / f"{row.preset}.yaml"],
        [
            f"recipe={row.recipe}",
            f"seed={seed}",
            f"runs_dir={runs}",
            f"name={table}-{slug}-{seed}",
            "eval.every=0",
            "eval.prompts=400",
            "algorithm.credit.normalize=none",  # the papers' traces; a row may say otherwise
            "learner.logprob_gap_stop=.inf",  # a policy that runs away is a result
            *row.overrides,
            *more,
        ],
        CONFIGS / "recipes",
    )


def folder_of(config: Config) -> Path:
    return Path(config.runs_dir) / str(config.name)


def is_finished(config: Config) -> bool:
    """With this very configuration: a recipe that has changed since is run again."""
    folder, config = folder_of(config), settled(found(config), lambda _: None)
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
        tokens=[record["tokens/generated"] for record in steps],
    )


def interval(values: list[float], draws: int = 10_000) -> tuple[float, float, float]:
    """Mean and 95 % bootstrap interval over seeds."""
    data = np.array(values)
    resampled = np.random.default_rng(0).choice(data, (draws, len(data))).mean(axis=1)
    low, high = np.percentile(resampled, [2.5, 97.5])
    return float(data.mean()), float(low), float(high)


def _equal_tokens(outcomes: list[Outcome]) -> float | None:
    """Tokens that every run had, where some have sampled many more than others."""
    totals = [sum(each.tokens) for each in outcomes]
    return min(totals) if totals and 0 < 1.5 * min(totals) < max(totals) else None


def _spent(mine: list[Outcome], budget: float | None) -> str:
    """Cells of a table whose rows differ in tokens."""
    if budget is None:
        return ""
    area = interval([100 * each.area_within(budget) for each in mine])
    tokens = np.mean([np.mean(each.tokens) for each in mine])
    return f"| {area[0]:.1f} [{area[1]:.1f}, {area[2]:.1f}] | {tokens:,.0f} "


def markdown(rows: list[Row], outcomes: list[Outcome]) -> str:
    """The table, rows in their own order."""
    budget = _equal_tokens(outcomes)
    lines = [
        "| recipe | seeds | held-out accuracy, % | area under the training curve, % "
        + (f"| area at equal tokens, % | tokens a step {_REST}" if budget else _REST),
        "|---|---|---|---|---|---|---|" + ("---|---|" if budget else ""),
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
            f"| {area[0]:.1f} [{area[1]:.1f}, {area[2]:.1f}] {_spent(mine, budget)}"
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


def _by_actors(configs: list[Config]) -> Iterator[list[Config]]:
    """Runs that may share actors, in their order: those of one environment and one verifier."""
    while configs:
        alike = [config for config in configs if _judged(config) == _judged(configs[0])]
        yield alike
        configs = [config for config in configs if config not in alike]


def _judged(config: Config) -> tuple[object, object]:
    return config.environment, config.verifier


def train(configs: list[Config]) -> None:
    """Train them all.

    Raises: `SystemExit` when SIGTERM has ended one, so that no other is begun.
    """
    for runs in _by_actors(configs):
        try:
            train_each(runs)  # returns early, and without a word, behind a checkpoint
        except CancelledError as error:
            raise SystemExit(_STOPPED) from error
        if not all(is_finished(config) for config in runs):
            raise SystemExit(_STOPPED)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tables", nargs="+", help=f"{', '.join(TABLES)}; key=value")
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
            train(missing)
        finally:
            done = [outcome(row, config) for row, config in jobs if is_finished(config)]
            done = [*kept.values(), *done]
            if done:
                write(table, rows, done, options.out)
                print(markdown(rows, done))


if __name__ == "__main__":
    main()
