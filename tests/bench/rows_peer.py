"""Completions trained per second on SmolLM2, against TRL on the same prompts."""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path

from harness import Row, emit
from peer import EQUAL, prompts_of, train, trl

from deploy.models.resolve import resolve_model

STEPS, WARMING = 8, 2
"""Ours: the learner's heap grows in the first two, and its pages are touched for the first time."""
TOGETHER = 2
"""Steps of ours in a repeat: groups of equal rewards make one short, and the next then waits."""
PEER_STEPS, PEER_WARMING = 3, 1
"""One takes over a minute, whatever its rewards are."""


def main() -> None:
    keys = (f"steps={STEPS}", "eval.every=0", "eval.prompts=8", "checkpoint.every=0")
    with tempfile.TemporaryDirectory() as name:
        config, records = train("smollm2", Path(name), *EQUAL, *keys)
        prompts = prompts_of(Path(name))
    records = [record for record in records if "grad_norm" in record][WARMING:]
    steps = [record["time/step"] for record in records]
    length = statistics.mean(record["completion_length/mean"] for record in records)
    starts = range(0, len(steps), TOGETHER)
    ours = [statistics.mean(steps[start : start + TOGETHER]) for start in starts]
    model = str(resolve_model(config.model.path))
    theirs = trl(model, config, prompts, steps=PEER_STEPS)
    peer = theirs.seconds[PEER_WARMING:]
    completions = config.completions_per_step
    emit(
        [
            Row(
                "completions trained per second, SmolLM2",
                "TRL 1.16 GRPOTrainer, 8 x 8",
                [statistics.median(peer) / mine for mine in ours],
                5.0,
                True,
                f"{completions / statistics.median(ours):.2f} against "
                f"{completions / statistics.median(peer):.2f} completions/s, of {length:.0f} "
                f"and {theirs.tokens:.0f} tokens",
            )
        ]
    )


if __name__ == "__main__":
    main()
