"""What a replay found, as text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from deploy.inspector.replay import Replay, run_config

_SHOWN = 12
_METRICS = (
    ("completions without advantage", "completions/zero_advantage"),
    ("tokens in the loss", "tokens/trained"),
    ("loss", "loss/policy"),
    ("gradient norm", "grad_norm"),
    ("tokens clipped", "clip_fraction"),
    ("mean credit of a token", "credit/mean_weight"),
)


def describe(replay: Replay, rule: str) -> str:
    """The text that `grpo-lambda replay` prints.

    Args:
        rule: name of the run's own credit rule.
    """
    return "\n".join([*_verdict(replay), *_comparison(replay, rule)])


def name_of(run: Path) -> str:
    """Name of the run's recipe."""
    return Path(run_config(run).recipe or "the run").stem


def _verdict(replay: Replay) -> list[str]:
    start = f"checkpoint {replay.from_step}" if replay.from_step else "the first model"
    lines = [f"step {replay.step}, computed again from {start} and the trajectory log"]
    if not replay.differences:
        return [
            *lines,
            f"{replay.compared} numbers compared with the record: all the same, bitwise",
        ]
    worst = max(difference.relative for difference in replay.differences)
    lines.append(
        f"{len(replay.differences)} of {replay.compared} numbers differ from the record, by up to "
        f"{worst:.2g} of their size:"
    )
    for difference in replay.differences[:_SHOWN]:
        lines.append(
            f"  {difference.name:<34} {difference.recorded:>16.9g} {difference.replayed:>16.9g}"
        )
    if replay.ranks > 1:
        lines.append(f"the run had {replay.ranks} learner ranks, the replay one: sums round apart")
    return [
        *lines,
        "another processor, thread count or release of torch rounds differently, by some 1e-5; "
        "more than that means other data, another configuration or a defect",
    ]


def _comparison(replay: Replay, rule: str) -> list[str]:
    if replay.other is None:
        return []
    other = replay.other
    lines = ["", f"{'':<34}{rule:>24}{other.name:>24}"]
    for label, name in _METRICS:
        values = (replay.metrics.get(name, float("nan")), other.metrics.get(name, float("nan")))
        lines.append(f"{label:<34}" + "".join(f"{value:>24.6g}" for value in values))
    shares = [early_share(table) for table in (replay.credit, other.credit)]
    label = "credit on the first half of tokens"
    lines.append(f"{label:<34}" + "".join(f"{share:>24.1%}" for share in shares))
    label = "cosine with the run's advantages"
    lines.append(f"{label:<34}{'':>24}{cosine(replay.credit, other.credit):>24.4f}")
    return [*lines, "", f"every token's credit under {other.name}: {other.logged}"]


def early_share(table: pa.Table) -> float:
    """Share of all |advantage| that lies on the first half of a completion's tokens."""
    early = total = 0.0
    for values in _rows(table):
        if values is not None:
            inside = np.abs(values[~np.isnan(values)])
            early += float(inside[: len(inside) // 2].sum())
            total += float(inside.sum())
    return early / total if total else 0.0


def cosine(mine: pa.Table, theirs: pa.Table) -> float:
    """Cosine between the advantages of all tokens under two rules. Without credit it is 0."""
    products = np.zeros(3)
    for a, b in zip(_rows(mine), _rows(theirs), strict=True):
        if a is None and b is None:
            continue
        x, y = (np.zeros(1) if row is None else np.nan_to_num(row) for row in (a, b))
        products += [np.sum(x * y), np.sum(x * x), np.sum(y * y)]
    size = float(np.sqrt(products[1] * products[2]))
    return float(products[0]) / size if size else 0.0


def _rows(table: pa.Table) -> list[npt.NDArray[np.float64] | None]:
    column = table.column("advantages").to_pylist()
    return [None if row is None else np.asarray(row, np.float64) for row in column]
