"""From the log of a suite to its numbers: results.json, completions.parquet, a table to read.

Legend: P problems, N samples a problem, M metrics.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet

from actors.verifiers.registry import voter
from common.config.sections import VerifierSpec
from common.errors import RunError
from common.record.episodes import ENDED, EpisodeSums, episode_metrics, episode_sums
from common.record.schema import CUT, ERROR, PASS, TIMEOUT, VERDICT_PREFIX
from common.record.trajectory_log import read_log
from common.record.turns import sampled_lengths
from deploy.eval.metrics import (
    CONFIDENCE,
    RESAMPLES,
    Estimate,
    Floats,
    avg_at_n,
    bootstrap,
    majority,
    pass_at_k,
    powers_of_two,
)

RESULTS, COMPLETIONS = "results.json", "completions.parquet"
_NAMED = 50
_COUNTED_AS = "samples without a verdict count as wrong"


@dataclass(frozen=True)
class Samples:
    """Every sample of a suite, in order of problem and sample.

    `completions` has one row a sample, the columns those of `_rows`.
    """

    completions: pa.Table
    correct_PN: npt.NDArray[np.bool_]
    lengths_PN: Floats
    truncated_PN: npt.NDArray[np.bool_]
    verdicts: Counter[str]
    episodes: dict[str, float]
    """What they were like (`common.record.episodes`); empty where no environment took part."""
    votes: bool
    """Whether the grader knows what an answer is."""


def collect(folder: Path, problems: int, samples: int, grader: VerifierSpec) -> Samples:
    """Read a suite's log back.

    Raises: `RunError` when a sample is missing.
    """
    rows, played = _rows(folder, samples, grader)
    if missing := problems * samples - len(rows):
        raise RunError(f"{missing} samples are not in {folder}: call again to go on")
    table = pa.Table.from_pylist([rows[number] for number in sorted(rows)])
    shape = (problems, samples)
    return Samples(
        completions=table,
        correct_PN=np.array([v == PASS for v in table["verdict"].to_pylist()]).reshape(shape),
        lengths_PN=table["length"].to_numpy().astype(np.float64).reshape(shape),
        truncated_PN=np.array(
            [reason in CUT for reason in table["finish_reason"].to_pylist()]
        ).reshape(shape),
        verdicts=Counter(table["verdict"].to_pylist()),
        episodes=episode_metrics(played),
        votes=voter(grader.name) is not None,
    )


def _rows(
    folder: Path, samples: int, grader: VerifierSpec
) -> tuple[dict[int, dict[str, Any]], list[EpisodeSums | None]]:
    """By number of the sample, and what its episode was like.

    What tokens, log-probabilities and tests it had is in the log.
    """
    vote: Callable[..., str | None] = voter(grader.name) or (lambda *_, **__: None)
    rows: dict[int, dict[str, Any]] = {}
    played: list[EpisodeSums | None] = []
    for batch in read_log(folder):
        (verdicts,) = [name for name in batch.schema.names if name.startswith(VERDICT_PREFIX)]
        played.append(episode_sums(batch))
        for row, length in zip(batch.to_pylist(), sampled_lengths(batch).tolist(), strict=True):
            number = row["group_id"]
            reference = json.loads(row["reference"])
            rows[number] = {
                "problem": number // samples,
                "sample": number % samples,
                "prompt_id": row["prompt_id"],
                "prompt": row["prompt_text"],
                "completion": row["text"],
                "answer": vote(row["text"], reference, **grader.args),
                "stored": reference.get("answer"),
                "verdict": row[verdicts],
                "reward": row["reward"],
                "finish_reason": row["finish_reason"],
                "length": length,
                "turns": len(row["turns"]),
                "reason": row["environment_reason"],
            }
    return rows, played


def metrics_of(samples: Samples, seed: int) -> dict[str, Estimate]:
    """Means over problems with intervals; in them a sample without a verdict is a wrong one.

    avg@N, pass@k for the powers of two up to N, maj@N where the grader knows answers; length in
    tokens that the policy sampled; turns, where an environment took part; truncated, the share of
    samples that ran into a limit: of tokens, turns, or the context.
    """
    n = samples.correct_PN.shape[1]
    values_P: dict[str, Floats] = {f"avg@{n}": avg_at_n(samples.correct_PN)}
    correct_P = samples.correct_PN.sum(axis=1)
    for k in powers_of_two(n):
        if k > 1:
            values_P[f"pass@{k}"] = pass_at_k(n, correct_P, k)
    if samples.votes and n > 1:
        answers = samples.completions["answer"].to_pylist()
        values_P[f"maj@{n}"] = np.array(
            [
                majority(answers[p * n : (p + 1) * n], marks_N.tolist())
                for p, marks_N in enumerate(samples.correct_PN)
            ]
        )
    values_P["length"] = samples.lengths_PN.mean(axis=1)
    if samples.episodes:
        turns = samples.completions["turns"].to_numpy().astype(np.float64)
        values_P["turns"] = turns.reshape(samples.lengths_PN.shape).mean(axis=1)
    values_P["truncated"] = samples.truncated_PN.mean(axis=1)
    estimates = bootstrap(list(values_P.values()), seed)
    return dict(zip(values_P, estimates, strict=True))


def results_of(
    samples: Samples, settings: Mapping[str, Any], reasons: Mapping[str, int]
) -> dict[str, Any]:
    """What results.json holds. `reasons`: why the grader could not judge, and how often."""
    seed = settings["sampling"]["seed"]
    unscored = [
        {key: row[key] for key in ("problem", "sample", "verdict")}
        for row in samples.completions.select(["problem", "sample", "verdict"]).to_pylist()
        if row["verdict"] in (ERROR, TIMEOUT)
    ]
    return {
        "suite": settings["suite"]["name"],
        "model": settings["model"],
        "problems": settings["problems"],
        "samples": settings["sampling"]["samples"],
        "metrics": {name: asdict(value) for name, value in metrics_of(samples, seed).items()},
        "intervals": f"{100 * CONFIDENCE:g} %, percentiles of {RESAMPLES} bootstrap draws of "
        f"problems, seed {seed}",
        "verdicts": dict(samples.verdicts),
        **({"episodes": samples.episodes} if samples.episodes else {}),
        "unscored": {
            "count": len(unscored),
            "counted_as": _COUNTED_AS,
            "completions": unscored[:_NAMED],
            "reasons": dict(reasons),
        },
        "settings": dict(settings),
    }


def write(folder: Path, samples: Samples, results: Mapping[str, Any]) -> None:
    """Write completions.parquet, then results.json, so that with the second there is all.

    Each is written aside and renamed whole.

    Raises: `OSError` when the disk does not take it.
    """
    partial = folder / f"{COMPLETIONS}.partial"
    pa.parquet.write_table(samples.completions, partial, compression="zstd")
    os.replace(partial, folder / COMPLETIONS)
    partial = folder / f"{RESULTS}.partial"
    partial.write_text(json.dumps(results, indent=1))
    os.replace(partial, folder / RESULTS)


def table(results: Mapping[str, Any]) -> str:
    """For a terminal."""
    lines = [
        f"{results['suite']}: {results['problems']} problems x {results['samples']} sample(s), "
        f"{results['model']}"
    ]
    for name, estimate in results["metrics"].items():
        lines.append(f"  {name:<10} {_shown(name, estimate)}")
    if episodes := results.get("episodes"):
        lines.append(f"  {'episodes':<10} {_of_episodes(episodes)}")
    unscored = results["unscored"]["count"]
    if unscored:
        kinds = ", ".join(f"{results['verdicts'].get(kind, 0)} {kind}" for kind in (ERROR, TIMEOUT))
        total = results["problems"] * results["samples"]
        lines.append(f"  {'unscored':<10} {unscored} of {total} ({kinds}), counted as wrong")
        lines += [
            f"    {count} times: {why}" for why, count in results["unscored"]["reasons"].items()
        ]
    return "\n".join(lines)


def _shown(name: str, estimate: Mapping[str, float]) -> str:
    value, low, high = estimate["value"], estimate["low"], estimate["high"]
    if name in ("length", "turns"):
        unit = "tokens" if name == "length" else ""
        return f"{value:6.1f} {unit:<6} [{low:.1f}, {high:.1f}]"
    return f"{100 * value:6.1f} %      [{100 * low:.1f}, {100 * high:.1f}]"


def _of_episodes(episodes: Mapping[str, float]) -> str:
    """What episodes were like, in a line."""
    ends = {
        name.removeprefix(ENDED): int(count)
        for name, count in episodes.items()
        if name.startswith(ENDED) and count
    }
    return (
        f"{episodes['episode/given_tokens']:.1f} tokens given, "
        f"{episodes['episode/environment_s']:.2g} s in the environment; ended by "
        + ", ".join(f"{name} {count}" for name, count in ends.items())
    )
