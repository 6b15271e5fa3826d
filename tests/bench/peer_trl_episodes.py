"""TRL's GRPOTrainer with `environment_factory`, on tasks of ours, in an environment of its own.

    python peer_trl_episodes.py JOB.json RESULT.json

JOB: as of `peer_trl.py`, but prompts are [[messages, answer]]. Beside it tool_calls, the most turns
with a call; save, where the trained model goes.
RESULT: as of `peer_trl.py`; tokens count those of tools too, and calls is those an episode made.

The model asks its calculator by `[calc: 34*56]`, and TRL has to be told of that form: the template
writes it, the response template reads it. TRL tries templates with tools of names it makes up,
which are written as JSON here. Imports nothing of this project.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peer_trl import LENGTHS, Clock, is_right, settings
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOTrainer

CALLS = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|im_start|>assistant\n",
    "fields": {
        "tool_calls": {
            "open_pattern": r"\[calc:\s*",
            "close_pattern": r"\]",
            "repeats": True,
            "content": "text",
            "transform": {
                "type": "function",
                "function": {"name": "calc", "arguments": {"expression": "{content}"}},
            },
        },
        "content": {"close_pattern": r"<\|im_end\|>\s*", "content": "text"},
    },
}
PRODUCT = re.compile(r"\s*(-?\d{1,18})\s*([*+-])\s*(-?\d{1,18})\s*")
MADE: list[int] = []
"""Calls of every episode so far."""


class Calculator:
    """What `actors.environments.calculator` is to our side."""

    def reset(self, **row: Any) -> None:
        """Nothing has to be told."""

    def calc(self, expression: str) -> str:
        """Work out an expression.

        Args:
            expression: Two whole numbers with *, + or - between them.

        Returns:
            The result.
        """
        parts = PRODUCT.fullmatch(expression)
        if parts is None:
            return "error: write two whole numbers with *, + or - between them"
        left, right = int(parts[1]), int(parts[3])
        value = {"*": left * right, "+": left + right, "-": left - right}[parts[2]]
        return f"result: {value}"


def reward(
    completions: list[list[dict[str, Any]]],
    answer: list[str],
    completion_ids: list[list[int]],
    **_: object,
) -> list[float]:
    """By the last number of the last thing that the policy said."""
    LENGTHS.extend(map(len, completion_ids))
    said = [[m for m in messages if m["role"] == "assistant"] for messages in completions]
    MADE.extend(sum(bool(m.get("tool_calls")) for m in messages) for messages in said)
    last = [str(messages[-1].get("content") or "") if messages else "" for messages in said]
    return [float(is_right(text, want)) for text, want in zip(last, answer, strict=True)]


def main() -> None:
    with open(sys.argv[1]) as file:
        job = json.load(file)
    tokenizer: Any = AutoTokenizer.from_pretrained(job["model"])
    tokenizer.chat_template = Path(__file__).with_name("peer_calc.jinja").read_text()
    tokenizer.response_template = CALLS
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    rows = [{"prompt": messages, "answer": want} for messages, want in job["prompts"]]
    clock = Clock(job, tokenizer)
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=settings(job, sys.argv[2] + ".trainer"),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[clock],
        environment_factory=Calculator,
    )
    trainer.train()
    trainer.save_model(job["save"])
    found = {
        "seconds": clock.seconds,
        "accuracy": [],
        "tokens": sum(LENGTHS) / len(LENGTHS),
        "calls": sum(MADE) / len(MADE),
    }
    Path(sys.argv[2]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
