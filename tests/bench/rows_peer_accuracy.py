"""Training seconds to the same held-out accuracy on the tiny preset, against TRL; three seeds."""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path

from harness import Row, emit
from peer import EQUAL, held_out_of, prompts_of, train, trl

from deploy.models import resolve_model

TARGET, EVERY, SEEDS, STEPS = 0.70, 5, 3, 60


def main() -> None:
    ratios, ours, theirs = [], [], []
    for seed in range(SEEDS):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            config, records = train(
                "tiny",
                folder,
                f"seed={seed}",
                f"steps={STEPS}",
                f"eval.every={EVERY}",
                *EQUAL,
            )
            prompts, held_out = prompts_of(folder), held_out_of(folder)
        seconds, evaluating, mine = 0.0, 0.0, float("inf")
        for record in records[1:]:
            # An evaluation runs beside the next step, which waits for its end: not training.
            seconds += record["time/step"] - min(evaluating, record["time/wait_delivery"])
            evaluating = record.get("time/eval", 0.0)
            if record.get("eval/accuracy", 0.0) >= TARGET:
                mine = seconds
                break
        peer = trl(
            str(resolve_model(config.model.path)),
            config,
            prompts,
            held_out=held_out,
            eval_every=EVERY,
            target=TARGET,
        )
        reached = [at for at, accuracy in peer.accuracy if accuracy >= TARGET]
        ours.append(mine)
        theirs.append(reached[0] if reached else sum(peer.seconds))
        ratios.append(theirs[-1] / mine)
    emit(
        [
            Row(
                f"training seconds to {100 * TARGET:.0f} % held out, tiny preset, GRPO",
                "TRL 1.16 GRPOTrainer",
                ratios,
                5.0,
                True,
                f"{statistics.median(ours):.0f} against {statistics.median(theirs):.0f} s, "
                f"{SEEDS} seeds",
            )
        ]
    )


if __name__ == "__main__":
    main()
