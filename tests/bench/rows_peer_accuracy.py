"""Training seconds to the same held-out accuracy, against TRL: `tiny` or `smollm2`."""

from __future__ import annotations

import statistics
import sys
import tempfile
from pathlib import Path

from harness import Row, emit
from peer import EQUAL, held_out_of, prompts_of, train, trl

from deploy.models.resolve import resolve_model

EVERY = 5


def seconds_to(preset: str, seed: int, steps: int, target: float) -> tuple[float, float]:
    """(ours, TRL's) training seconds until an evaluation reaches `target`."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        keys = (f"seed={seed}", f"steps={steps}", f"eval.every={EVERY}", *EQUAL)
        config, records = train(preset, folder, *keys)
        prompts, held_out = prompts_of(folder), held_out_of(folder)
    seconds, evaluating, ours = 0.0, 0.0, float("inf")
    for record in records[1:]:
        # An evaluation runs beside the next step, which waits for its end: not training.
        seconds += record["time/step"] - min(evaluating, record["time/wait_delivery"])
        evaluating = record.get("time/eval", 0.0)
        if record.get("eval/accuracy", 0.0) >= target:
            ours = seconds
            break
    peer = trl(
        str(resolve_model(config.model.path)),
        config,
        prompts,
        held_out=held_out,
        eval_every=EVERY,
        target=target,
    )
    reached = [at for at, accuracy in peer.accuracy if accuracy >= target]
    return ours, reached[0] if reached else sum(peer.seconds)


def row(preset: str, seeds: int, steps: int, target: float) -> Row:
    ours, theirs = zip(*[seconds_to(preset, s, steps, target) for s in range(seeds)], strict=True)
    return Row(
        f"training seconds to {100 * target:.0f} % held out, {preset} preset, GRPO",
        "TRL 1.16 GRPOTrainer",
        [peer / mine for mine, peer in zip(ours, theirs, strict=True)],
        5.0,
        True,
        f"{statistics.median(ours):.0f} against {statistics.median(theirs):.0f} s, {seeds} seed(s)",
    )


if __name__ == "__main__":
    rows = {"tiny": (3, 60, 0.70), "smollm2": (1, 30, 0.50)}
    emit([row(sys.argv[1], *rows[sys.argv[1]])])
