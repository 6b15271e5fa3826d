"""Steps a second of episodes with a calculator, SmolLM2, against TRL's `environment_factory`.

Both have the preset's questions, as many steps, and the same rule. What both have learned is asked
by one evaluation, of products that neither was trained on.
"""

from __future__ import annotations

import itertools
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from harness import CONFIGS, ROOT, Row, emit
from peer import EQUAL, train, trl

from common.record.trajectory_log import read_log
from deploy.models.resolve import resolve_model

STEPS, WARMING = 4, 1
"""Of both; pages are touched for the first time in the first."""
PROMPTS, SIZE, TOKENS, TURNS, HELD_OUT = 2, 8, 64, 3, 40


def main() -> None:
    lines = itertools.islice((CONFIGS / "calculator.jsonl").open(), PROMPTS * STEPS)
    rows = [json.loads(line) for line in lines]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config, records = train(
            "smollm2-calculator",
            folder,
            *EQUAL,
            *(f"batch.prompts_per_step={PROMPTS}", f"batch.group_size={SIZE}", f"steps={STEPS}"),
            *(f"environment.max_turns={TURNS}", f"environment.turn_tokens={TOKENS}"),
            f"generator.max_completion_tokens={TOKENS}",
            *("eval.every=0", "eval.prompts=0", f"checkpoint.every={STEPS}"),
        )
        steps = [record["time/step"] for record in records if "grad_norm" in record][WARMING:]
        played = list(read_log(folder / "ours" / "trajectories"))
        length = statistics.mean(len(ids) for batch in played for ids in batch["token_ids"])
        model = str(resolve_model(config.model.path))
        peer = trl(
            model,
            config,
            [(row["prompt"], row["answer"]) for row in rows],
            "peer_trl_episodes",
            tool_calls=TURNS - 1,
            save=str(folder / "theirs"),
        )
        models = (model, folder / "ours" / "checkpoints" / f"step-{STEPS}", folder / "theirs")
        before, ours, theirs = (right(str(each), folder / f"{i}") for i, each in enumerate(models))
    theirs_s = statistics.median(peer.seconds[WARMING:])
    emit(
        [
            Row(
                "steps per second of episodes with a calculator, SmolLM2",
                f"TRL 1.16 GRPOTrainer with environment_factory, {PROMPTS} x {SIZE}",
                [theirs_s / mine for mine in steps],
                5.0,
                True,
                f"{statistics.median(steps):.1f} against {theirs_s:.1f} s a step, episodes of "
                f"{length:.0f} and {peer.tokens:.0f} tokens, {peer.calls:.1f} calls there; "
                f"held-out products right after {STEPS} steps: {ours:.0%} and {theirs:.0%}, "
                f"before {before:.0%}",
            )
        ]
    )


def right(model: str, out: Path) -> float:
    """Share of held-out products that a model has right, by `grpo-lambda eval`."""
    command = [sys.executable, "-m", "deploy.cli", "eval", model, "--suite", "calculator"]
    command += ["--out", str(out), "--limit", str(HELD_OUT), "--samples", "2"]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    found = json.loads((out / "results.json").read_text())["metrics"]
    return float(next(iter(found.values()))["value"])


if __name__ == "__main__":
    main()
