"""The tiny preset's supervised warm start: it can work a sum out, and often guesses instead.

A careful demonstration works a `chain_sum` question of three digits out from left to right:
` 3+8=11;11-5=6`. A hasty one blurts a number. How often a demonstration is hasty depends on the
question's first digit, so the warm model answers some questions well and others badly. What
reinforcement learning has to find is one decision at the start of the answer, which is paid for at
its end: a small, clean case for credit assignment.

There are two phases. `facts` teaches single steps in bulk (a row is one step). `answers` teaches
the format and the mixture. Both take a fixed number of batches from a seed.

Legend: B rows, T tokens.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from actors.data.held_out import is_held_out

TASK = {"min_terms": 3, "max_terms": 3, "min_digits": 1, "max_digits": 1}
"""reasoning-gym's `chain_sum`: 4000 distinct questions."""

HASTY = {True: 0.75, False: 0.25}
"""Share of hasty demonstrations where the first digit is 5 or more, and where it is less."""

_FACT_STEPS, _FACT_BATCH = 120, 256
_ANSWER_STEPS, _ANSWER_BATCH = 150, 64
_LEARNING_RATE = 5e-3
_WARMUP_STEPS = 20
_IGNORED = -100

Row = tuple[str, str]
"""Given text and text to learn."""


def solution(expression: str) -> str:
    """`3 + 8 - 5` worked from left to right: `3+8=11;11-5=6`."""
    first, *rest = expression.split()
    total, steps = int(first), []
    for operator, term in zip(rest[::2], rest[1::2], strict=True):
        result = total + int(term) if operator == "+" else total - int(term)
        steps.append(f"{total}{operator}{term}={result}")
        total = result
    return ";".join(steps)


def facts(seed: int) -> Iterator[Row]:
    """Make single steps, as they stand inside a careful answer, for ever."""
    draw = random.Random(seed)
    while True:
        first = draw.randint(-9, 18) if draw.random() < 0.7 else draw.randint(0, 9)
        step = solution(f"{first} {draw.choice('+-')} {draw.randint(0, 9)}")
        given, _, result = step.partition("=")
        yield f"{given}=", result


def answers(seed: int) -> Iterator[Row]:
    """Make careful and hasty answers to training questions; none that `is_held_out`."""
    import reasoning_gym

    draw = random.Random(seed)
    # Far from the seeds of training runs, which are small; what holds questions apart is the rule.
    task = reasoning_gym.create_dataset("chain_sum", seed=seed + 10**9, size=10**8, **TASK)
    for entry in task:
        expression = entry["metadata"]["expression"]
        if is_held_out(entry["question"]):
            continue
        hasty = draw.random() < HASTY[int(expression[0]) >= 5]
        answer = str(draw.randint(-9, 27)) if hasty else solution(expression)
        yield entry["question"], f" {answer}"


def warm_start(model: Any, tokenizer: Any, seed: int) -> None:
    """Train `model` in place on both phases, on every core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    try:
        _train(model, tokenizer, facts(seed), _FACT_STEPS, _FACT_BATCH, ends=False)
        _train(model, tokenizer, answers(seed), _ANSWER_STEPS, _ANSWER_BATCH, ends=True)
    finally:
        torch.set_num_threads(threads)


def _train(
    model: Any, tokenizer: Any, rows: Iterator[Row], steps: int, batch: int, *, ends: bool
) -> None:
    optimizers = _optimizers(model)

    def rate(step: int) -> float:
        return min(1.0, (step + 1) / _WARMUP_STEPS, (steps - step) / (0.3 * steps))

    schedules = [torch.optim.lr_scheduler.LambdaLR(each, rate) for each in optimizers]
    for _ in range(steps):
        ids_BT, targets_BT = _batch(list(islice(rows, batch)), tokenizer, ends)
        logits = model(input_ids=ids_BT).logits[:, :-1]
        loss = cross_entropy(
            logits.flatten(0, 1), targets_BT[:, 1:].flatten(), ignore_index=_IGNORED
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        model.zero_grad()


def _optimizers(model: Any) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, which need a third of AdamW's steps; AdamW else."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "layers" in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "layers" not in n]
    return [
        torch.optim.Muon(matrices, lr=_LEARNING_RATE, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=_LEARNING_RATE, betas=(0.9, 0.95)),
    ]


def _batch(rows: list[Row], tokenizer: Any, ends: bool) -> tuple[Tensor, Tensor]:
    """Token ids and targets [B, T]; given text and padding are not targets."""
    end = [tokenizer.eos_token_id] if ends else []
    encoded = [(tokenizer(a).input_ids, [*tokenizer(b).input_ids, *end]) for a, b in rows]
    width = max(len(given) + len(learnt) for given, learnt in encoded)
    ids_BT = torch.full((len(rows), width), tokenizer.pad_token_id)
    targets_BT = torch.full((len(rows), width), _IGNORED)
    for row, (given, learnt) in enumerate(encoded):
        stop = len(given) + len(learnt)
        ids_BT[row, :stop] = torch.tensor(given + learnt)
        targets_BT[row, len(given) : stop] = torch.tensor(learnt)
    return ids_BT, targets_BT
