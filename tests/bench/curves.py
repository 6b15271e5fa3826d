"""Training curves of a comparison: one small panel a recipe, its band against the first row's."""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib as mpl
import numpy as np
import numpy.typing as npt

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

WINDOW = 8
"""Steps of the moving average."""
COLUMNS = 4
INK, GREY = "#c2410c", "#64748b"

Curves = list[list[float]]


def smooth(curve: list[float]) -> npt.NDArray[np.float64]:
    """Trailing mean over up to `WINDOW` steps."""
    sums = np.cumsum([0.0, *curve])
    ends = np.arange(1, len(curve) + 1)
    starts = np.maximum(0, ends - WINDOW)
    mean: npt.NDArray[np.float64] = (sums[ends] - sums[starts]) / (ends - starts)
    return mean


def draw(axes: Axes, curves: Curves, colour: str, label: str) -> None:
    """Mean over seeds, and 1.96 standard errors around it."""
    smoothed = 100 * np.array([smooth(curve) for curve in curves])
    mean = smoothed.mean(axis=0)
    steps = np.arange(1, len(mean) + 1)
    axes.plot(steps, mean, color=colour, linewidth=1.6, label=label)
    if len(smoothed) > 1:
        error = 1.96 * smoothed.std(axis=0, ddof=1) / math.sqrt(len(smoothed))
        axes.fill_between(steps, mean - error, mean + error, color=colour, alpha=0.2, linewidth=0)


def plot(curves: dict[str, Curves], out: Path, name: str) -> None:
    """Write `name`.png; rows without a finished run are left out.

    Rows of one task, which stands before a colon, have a first row of their own to be held against.
    """
    curves = {label: runs for label, runs in curves.items() if runs}
    firsts = dict[str, str]()
    for label in curves:
        firsts.setdefault(_task(label), label)
    others = [(label, runs) for label, runs in curves.items() if firsts[_task(label)] != label]
    if not others:
        return
    columns = min(COLUMNS, len(others))
    figure, grid = plt.subplots(
        math.ceil(len(others) / columns),
        columns,
        figsize=(3.4 * columns, 2.5 * math.ceil(len(others) / columns) + 0.5),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axes in grid.flat[len(others) :]:
        axes.set_visible(False)
    for axes, (label, runs) in zip(grid.flat, others, strict=False):
        first = firsts[_task(label)]
        draw(axes, curves[first], GREY, first)
        draw(axes, runs, INK, label)
        axes.set_title(label, fontsize=9)
        axes.grid(alpha=0.25)
        axes.legend(fontsize=7, loc="lower right", frameon=False)
    figure.supxlabel("learner step", fontsize=9)
    figure.supylabel(f"training accuracy, % (mean of {WINDOW} steps)", fontsize=9)
    figure.savefig(out / f"{name}.png", dpi=110)
    plt.close(figure)


def _task(label: str) -> str:
    """What stands before a colon; nothing where there is none."""
    return label.rpartition(": ")[0]
