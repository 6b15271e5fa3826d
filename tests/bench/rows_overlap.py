"""Asynchronous against synchronous operation, generator and learner on a core each.

As separate devices would be: the same pinning in both modes, work chosen so that generation and
training take about equally long. Completions are long and all of one length, their rewards a
coin's: every step has the same work. Verifiers, log and coordinator have no cores of their own
here: what they take a group and a completion is time that both devices lose.

Generation and training are those of the synchronous run. Two things favour the first row: there
each completion has a seed, about 3 % of generation, and groups come when they are verified. Two
weigh against it: the cores share caches and clock, and when both work each is slower.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import Any

from harness import Row, emit
from peer import train
from workload import without_end

from deploy.models.resolve import resolve_model

STEPS, SKIPPED = 11, 3
KEYS = (
    "recipe=grpo",
    "placement.cores=split",
    f"steps={STEPS}",
    "eval.every=0",
    "eval.prompts=8",
    "checkpoint.every=0",
    "batch.prompts_per_step=16",
    "batch.group_size=16",
    "batch.tokens_per_microbatch=8192",
    "generator.max_completion_tokens=64",
    "verifier.rules=[{name: 'tests.bench.workload:coin'}]",
)


def steps_of(*overrides: str) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as name:
        model = without_end(resolve_model("builtin:tiny-chain-sum"), Path(name) / "model")
        _, records = train("tiny", Path(name), *KEYS, f"model.path={model}", *overrides)
    return [record for record in records if "grad_norm" in record][SKIPPED:]


def main() -> None:
    alone = steps_of("generator.max_staleness=0")
    both = steps_of("generator.max_staleness=1")
    # Synchronously, slots are freed when the generators hold the weights: no generation before.
    generate = statistics.median(
        r["time/wait_data"] - (r["time/publish"] - r["time/export"]) for r in alone
    )
    learn = statistics.median(r["time/train"] for r in alone)
    in_turns = statistics.median(r["time/step"] for r in alone)
    times = [record["time/step"] for record in both]
    uneven = not 0.7 < generate / learn < 1.4
    failure = f"{generate:.2f} s and {learn:.2f} s are not about equally long" if uneven else ""
    figures = f"generation {generate:.2f} s, training {learn:.2f} s, in turns {in_turns:.2f} s, "
    figures += f"overlapped {statistics.median(times):.2f} s a step of 256 completions of 64 tokens"
    # Pairs of steps: one waits when the other does not.
    pairs = [(a + b) / 2 for a, b in zip(times[::2], times[1::2], strict=False)]
    emit(
        [
            Row(
                "step time, asynchronous, a core each",
                "the longer of generation and training",
                [pair / max(generate, learn) for pair in pairs],
                1.15,
                False,
                figures,
                failure,
            ),
            Row(
                "completions per second, asynchronous, a core each",
                "our own synchronous mode",
                [in_turns / pair for pair in pairs],
                1.5,
                True,
                figures,
                failure,
            ),
        ]
    )


if __name__ == "__main__":
    main()
