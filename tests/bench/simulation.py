"""Is `deploy.predict.simulate` right? Costs measured in synchronous runs predict asynchronous ones.

    python tests/bench/simulation.py [FOLDER]   # runs of before in FOLDER are not run again

Three synchronous runs of the tiny preset, generator and learner on a core each, give the costs by
least squares: seconds of generation against decoding rounds, tokens and completions, seconds of
training against tokens. Four asynchronous runs of other sizes, which gave nothing to the costs, are
then predicted, with the lengths of their own completions. Writes simulation.md and the costs as
costs-tiny.json, which `grpo-lambda plan --costs` reads. Fails when a prediction is off by a fifth.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scaling
from harness import CONFIGS, RESULTS, machine

from common.config.load import load_config
from common.config.sections import Config
from common.record.metrics import read_metrics
from common.record.trajectory_log import read_log
from common.record.turns import sampled_lengths
from deploy.launch import train_each
from deploy.predict.simulate import Costs, Prediction, Simulation, Workload, measured_lengths

SKIPPED = 3
MEASURED = ((8, 8), (16, 16), (8, 64))
"""(prompts a step, completions a prompt) of the synchronous runs."""
PREDICTED = ((16, 8, 1), (8, 32, 1), (16, 64, 1), (8, 32, 3))
"""The same with the staleness, of the asynchronous ones."""
TOLERANCE = 0.20


@dataclass(frozen=True)
class Measured:
    """One run: its records behind the first steps, and the completions of each step."""

    config: Config
    records: list[dict[str, Any]]
    lengths: dict[int, np.ndarray]
    """Of all completions of a step, by step."""

    @property
    def step_s(self) -> float:
        return statistics.fmean(record["time/step"] for record in self.records)

    @property
    def trained_share(self) -> float:
        """Of the sampled tokens, those that the learner ran."""
        sampled = sum(self.lengths[record["step"]].sum() for record in self.records)
        return float(sum(record["tokens/trained"] for record in self.records) / sampled)


def configured(folder: Path, name: str, prompts: int, size: int, staleness: int) -> Config:
    keys = [
        *(f"runs_dir={folder}", f"name={name}", "recipe=grpo", "steps=12", "resume=auto"),
        "placement.cores=split",
        *("eval.every=0", "eval.prompts=8", "learner.credit_probe_every=0"),
        *(f"batch.prompts_per_step={prompts}", f"batch.group_size={size}"),
        *("batch.tokens_per_microbatch=8192", f"generator.max_staleness={staleness}"),
    ]
    return load_config([CONFIGS / "tiny.yaml"], keys, CONFIGS / "recipes")


def measured(config: Config) -> Measured:
    run = Path(config.runs_dir) / str(config.name)
    records = [r for r in read_metrics(run / "metrics.jsonl") if r["step"] > SKIPPED]
    groups = {
        b.column("ticket")[0].as_py(): sampled_lengths(b) for b in read_log(run / "trajectories")
    }
    order = [groups[turn] for turn in sorted(groups)]
    per_step = config.batch.prompts_per_step
    lengths = {
        step + 1: np.concatenate(order[step * per_step : (step + 1) * per_step])
        for step in range(len(order) // per_step)
    }
    return Measured(config, records, lengths)


def fit(runs: list[Measured], prompt_tokens: int) -> Costs:
    """Non-negative least squares over the steps of all runs."""
    rounds, generating, tokens, learning = [], [], [], []
    for run in runs:
        for record in run.records:
            lengths = run.lengths[record["step"]]
            # Synchronously, slots are freed when the generators hold the weights.
            delivering = record["time/publish"] - record["time/export"]
            generating.append(record["time/wait_data"] - delivering)
            rounds.append([lengths.max(), lengths.sum(), len(lengths)])
            prompts = run.config.batch.prompts_per_step * prompt_tokens
            tokens.append([1.0, record["tokens/trained"] + prompts])
            learning.append(record["time/train"])
    round_s, sequence_s, request_s = least_squares(rounds, generating)
    step_s, token_s = least_squares(tokens, learning)
    every = [record for run in runs for record in run.records]
    stall_s = statistics.median(record["publish/stall"] for record in every)
    publish_s = statistics.median(record["time/publish"] for record in every)
    export_s = statistics.median(record["time/export"] for record in every)
    return Costs(
        decode_round_s=round_s,
        decode_sequence_s=sequence_s,
        prefill_token_s=0.0,
        request_s=request_s,
        coordinate_s=coordinate_s(),
        verify_s=0.0,
        log_group_s=0.0,
        learner_step_s=step_s,
        learner_token_s=token_s,
        export_s=export_s,
        deliver_s=max(0.0, publish_s - export_s - stall_s),
        stall_s=stall_s,
    )


def coordinate_s() -> float:
    """Of the coordinator, a group, as `scaling.py` measured it."""
    points = json.loads((RESULTS / "scaling.json").read_text())["generators"]
    return statistics.median(point["coordinator_s"] for point in points) / scaling.PROMPTS


def least_squares(causes: list[list[float]], seconds: list[float]) -> list[float]:
    """Factors of the causes, none negative: those that would be are left out."""
    matrix, target = np.asarray(causes, float), np.asarray(seconds, float)
    kept = list(range(matrix.shape[1]))
    while True:
        found, *_ = np.linalg.lstsq(matrix[:, kept], target, rcond=None)
        if (found >= 0).all():
            factors = np.zeros(matrix.shape[1])
            factors[kept] = found
            return [float(factor) for factor in factors]
        kept = [cause for cause, factor in zip(kept, found, strict=True) if factor >= 0]


def predict(run: Measured, costs: Costs, prompt_tokens: int) -> Prediction:
    work = Workload.of(
        run.config,
        sequences=run.config.generator.max_concurrent_sequences,
        prompt_tokens=prompt_tokens,
        trained_share=run.trained_share,
    )
    pool = np.concatenate(list(run.lengths.values()))
    return Simulation(work, costs, measured_lengths([int(n) for n in pool])).run(40)


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(sys.argv[1] if sys.argv[1:] else name)
        turns = [configured(folder, f"in-turns-{p}x{g}", p, g, 0) for p, g in MEASURED]
        beside = [configured(folder, f"beside-{p}x{g}-{s}", p, g, s) for p, g, s in PREDICTED]
        train_each([*turns, *beside])
        first = next(read_log(folder / str(turns[0].name) / "trajectories"))
        prompt_tokens = len(first.column("prompt_ids")[0].as_py())
        costs = fit([measured(config) for config in turns], prompt_tokens)
        runs = [measured(config) for config in beside]
    lines = [
        json.dumps(machine()),
        "",
        f"costs: `{json.dumps(asdict(costs))}`",
        "",
        "| prompts x completions, staleness | measured, s a step | predicted | off by | busiest |",
        "|---|---|---|---|---|",
    ]
    worst = 0.0
    for run in runs:
        found = predict(run, costs, prompt_tokens)
        off = found.step_s / run.step_s - 1
        worst = max(worst, abs(off))
        batch, staleness = run.config.batch, run.config.generator.max_staleness
        lines.append(
            f"| {batch.prompts_per_step} x {batch.group_size}, {staleness} "
            f"| {run.step_s:.3f} | {found.step_s:.3f} | {off:+.0%} | {found.bottleneck} |"
        )
    lines += ["", f"largest error {worst:.0%}, allowed {TOLERANCE:.0%}", ""]
    print("\n".join(lines))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "simulation.md").write_text("\n".join(lines))
    (RESULTS / "costs-tiny.json").write_text(json.dumps(asdict(costs), indent=1) + "\n")
    sys.exit(worst > TOLERANCE)


if __name__ == "__main__":
    main()
