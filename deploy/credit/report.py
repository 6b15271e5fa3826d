"""What was measured, as a table to read, results.json and a Parquet file."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from deploy.credit.agreement import Agreement, agreement, ceiling, credit_of_segments
from deploy.credit.completions import Sampled
from deploy.credit.files import RESULTS, SEGMENTS
from deploy.credit.gradient import Directions
from deploy.credit.measured import Floats, Measured
from deploy.eval.metrics import Estimate

_LEGEND = (
    "gradient: cosine of the rule's gradient on these completions with that of the measured",
    "advantages, under the rule's objective and aggregation, at the policy that sampled them.",
    "of at most: the cosine that a perfect rule could show, from halves of the continuations.",
)
Credits = Mapping[tuple[int, int], Floats | None]
"""Credit of every token, by group and completion."""


@dataclass(frozen=True)
class Results:
    """What was measured of one step."""

    rows: list[dict[str, Any]]
    """A row a segment."""
    rules: dict[str, Agreement]
    directions: Mapping[str, Directions]
    """How far the gradient of each rule goes the way of the measured one."""
    ceiling: Estimate
    samples: int
    """Continuations with a reward."""
    unmeasured: int
    """Segments beside a branch without one."""

    @property
    def table(self) -> str:
        """The agreement of every rule, in lines."""
        errors = [row["advantage_error"] for row in self.rows]
        lines = [
            f"{len(self.rows)} segments from {self.samples} judged continuations; the standard "
            f"error of a measured advantage is {np.nanmean(errors):.2f} in the mean",
            *([f"{self.unmeasured} segments could not be measured"] if self.unmeasured else []),
            "",
            _line("credit of", "rank correlation", "same sign", "gradient", "of at most"),
        ]
        for name, found in self.rules.items():
            way = self.directions[name]
            shown = map(_shown, (found.rank, found.sign, way.cosine, way.ceiling))
            lines.append(_line(name, *shown))
        lines.append(_line("what the noise allows", _shown(self.ceiling)))
        lines += [f"{n}: no gradient, {d.missing}" for n, d in self.directions.items() if d.missing]
        return "\n".join([*lines, "", *_LEGEND])


def of(
    completions: Sequence[tuple[Sampled, Sequence[str]]],
    measured: Sequence[Measured],
    rules: Mapping[str, Credits],
    directions: Mapping[str, Directions],
) -> Results:
    """Put together what was measured with the credit of each rule.

    Args:
        completions: with the text of each token.
    """
    credits = {
        name: [
            credit_of_segments(credit.get(sampled.key), each)
            for (sampled, _), each in zip(completions, measured, strict=True)
        ]
        for name, credit in rules.items()
    }
    rows = [
        {
            "group_id": sampled.group_id,
            "completion_index": sampled.index,
            "reward": sampled.reward,
            "begin": begin,
            "end": end,
            "text": "".join(texts[begin:end]),
            "continuations": len(each.rewards[j]),
            "value": each.values_J[j],
            "value_error": each.errors_J[j],
            "advantage": each.advantages_J[j],
            "advantage_error": each.advantage_errors_J[j],
            **{f"credit/{name}": found[i][j] for name, found in credits.items()},
        }
        for i, ((sampled, texts), each) in enumerate(zip(completions, measured, strict=True))
        for j, (begin, end) in enumerate(each.segments)
    ]
    return Results(
        rows,
        {name: agreement(found, measured) for name, found in credits.items()},
        directions,
        ceiling(measured),
        sum(len(branch) for each in measured for branch in each.rewards),
        sum(math.isnan(row["advantage"]) for row in rows),
    )


def write(folder: Path, results: Results) -> None:
    """Write both files into the folder of the measure."""
    pa.parquet.write_table(pa.Table.from_pylist(results.rows), folder / SEGMENTS)
    said = {
        "segments": len(results.rows),
        "samples": results.samples,
        "unmeasured": results.unmeasured,
        "ceiling": asdict(results.ceiling),
        "rules": {name: asdict(found) for name, found in results.rules.items()},
        "gradients": {name: asdict(found) for name, found in results.directions.items()},
    }
    text = json.dumps(said, indent=1)
    (folder / RESULTS).write_text(text.replace("NaN", "null"))


def _line(name: str, *cells: str) -> str:
    return f"{name:<28} " + " ".join(f"{cell:<24}" for cell in cells).rstrip()


def _shown(estimate: Estimate) -> str:
    if math.isnan(estimate.value):
        return "not known"
    if math.isnan(estimate.low):
        return f"{estimate.value:.2f} [not known]"
    return f"{estimate.value:.2f} [{estimate.low:.2f}, {estimate.high:.2f}]"
