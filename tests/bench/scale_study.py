"""From 8 to 4,096 GPUs, by simulation: where completions per second stop growing, and why.

    python tests/bench/scale_study.py

Weak scaling: 32 prompts a step for every eight GPUs. Strong: 1,024 prompts a step on any number.
Every point has the best of a few splits between generation and learning. Costs are derived from
data sheets and assumptions (`deploy.predict.costs`), which the table begins with; the coordinator
and the log are one process each, whatever the size. Writes scale-study.md, .json and .png.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace

import matplotlib as mpl
from harness import CONFIGS, RESULTS

mpl.use("Agg")
import matplotlib.pyplot as plt

from common.config.load import load_config
from common.config.sections import Config
from deploy.predict.cluster_plan import ClusterPlan
from deploy.predict.costs import Assumptions
from deploy.predict.simulate import Prediction

SIZES = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
SHARES = (0.4, 0.5, 0.6, 0.7)
"""Of the GPUs, that generate."""
STEPS = 8
PER_EIGHT, STRONG = 32, 1024


@dataclass(frozen=True)
class Point:
    gpus: int
    generators: int
    prompts: int
    step_s: float
    completions_per_s: float
    busiest: str


def predict(config: Config, gpus: int, prompts: int) -> Point:
    """The best split of `gpus`."""
    found: list[tuple[float, int, Prediction]] = []
    for share in SHARES:
        count = max(1, round(gpus * share))
        sized = replace(
            config,
            batch=replace(config.batch, prompts_per_step=prompts),
            generator=replace(config.generator, count=count),
            learner=replace(config.learner, ranks=gpus - count),
            verifier=replace(config.verifier, workers=gpus),
        )
        plan = ClusterPlan.of(sized)
        if plan.problems:
            continue
        prediction = plan.predict(steps=STEPS)
        found.append((prediction.step_s, count, prediction))
    _, count, best = min(found, key=lambda each: each[0])
    return Point(gpus, count, prompts, best.step_s, best.completions_per_s, best.bottleneck)


def study() -> dict[str, list[Point]]:
    config = load_config([CONFIGS / "qwen2.5-7b-1x8.yaml"], [], CONFIGS / "recipes")
    curves: dict[str, list[Point]] = {"weak": [], "strong": []}
    for gpus in SIZES:
        for name, prompts in (("weak", PER_EIGHT * gpus // 8), ("strong", STRONG)):
            point = predict(config, gpus, prompts)
            curves[name].append(point)
            print(name, point, flush=True)
    return curves


def plot(curves: dict[str, list[Point]]) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for axis, (name, points) in zip(axes, curves.items(), strict=True):
        gpus = [point.gpus for point in points]
        rates = [point.completions_per_s for point in points]
        axis.plot(gpus, rates, "o-", color="#0f766e", label="predicted")
        ideal = [rates[0] * n / gpus[0] for n in gpus]
        axis.plot(gpus, ideal, "--", color="#9ca3af", label="in proportion")
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xlabel("GPUs (H100)")
        axis.set_title(f"{name} scaling", fontsize=10)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("completions trained on a second")
    axes[0].legend(frameon=False, fontsize=8)
    figure.suptitle("Qwen2.5-7B, 16 completions of at most 4,096 tokens a prompt", fontsize=10)
    figure.savefig(RESULTS / "scale-study.png", dpi=110)


def main() -> None:
    curves = study()
    lines = [f"Assumed: `{Assumptions()}`", ""]
    for name, points in curves.items():
        lines += [
            f"## {name} scaling",
            "",
            "| GPUs | generate | prompts a step | step, s | completions/s | efficiency | busiest |",
            "|---|---|---|---|---|---|---|",
        ]
        base = points[0].completions_per_s / points[0].gpus
        lines += [
            f"| {p.gpus} | {p.generators} | {p.prompts} | {p.step_s:.1f} "
            f"| {p.completions_per_s:.1f} | {p.completions_per_s / p.gpus / base:.0%} "
            f"| {p.busiest} |"
            for p in points
        ]
        lines.append("")
    (RESULTS / "scale-study.md").write_text("\n".join(lines))
    data = {name: [asdict(point) for point in points] for name, points in curves.items()}
    (RESULTS / "scale-study.json").write_text(json.dumps(data, indent=0) + "\n")
    plot(curves)


if __name__ == "__main__":
    main()
