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

import random
from collections.abc import Iterator
from contextlib import contextmanager
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


def facts(seed: int, terms: int = 3) -> Iterator[Row]:
    """Make single steps, as they stand inside a careful answer of `terms` digits, for ever."""
    draw = random.Random(seed)
    while True:
        first = (
            draw.randint(9 * (2 - terms), 9 * (terms - 1))
            if draw.random() < 0.7
            else draw.randint(0, 9)
        )
        step = solution(f"{first} {draw.choice('+-')} {draw.randint(0, 9)}")
        given, _, result = step.partition("=")
        yield f"{given}=", result


def answers(seed: int, terms: int = 3, *, careful: bool = False) -> Iterator[Row]:
    """Make careful and hasty answers to training questions; none that `is_held_out`.

    Args:
        careful: make no hasty ones.
    """
    import reasoning_gym

    draw = random.Random(seed)
    # Far from the seeds of training runs, which are small; what holds questions apart is the rule.
    long = TASK | {"min_terms": terms, "max_terms": terms}
    task = reasoning_gym.create_dataset("chain_sum", seed=seed + 10**9, size=10**8, **long)
    for entry in task:
        expression = entry["metadata"]["expression"]
        if is_held_out(entry["question"]):
            continue
        hasty = draw.random() < HASTY[int(expression[0]) >= 5] and not careful
        answer = str(draw.randint(9 * (2 - terms), 9 * terms)) if hasty else solution(expression)
        yield entry["question"], f" {answer}"


def warm_start(
    model: Any,
    tokenizer: Any,
    seed: int,
    terms: int = 3,
    *,
    times: int = 1,
    careful: bool = False,
) -> None:
    """Train `model` in place on both phases; sums are of `terms` digits.

    One core computes. Operations are short, so a second one saves little; where others use it,
    each operation waits for it.

    Args:
        times: how much longer than usual.
        careful: show it no hasty answer.
    """
    answered = answers(seed, terms, careful=careful)
    with computing(1):
        learn(model, tokenizer, facts(seed, terms), times * _FACT_STEPS, _FACT_BATCH, ends=False)
        learn(model, tokenizer, answered, times * _ANSWER_STEPS, _ANSWER_BATCH, ends=True)


@contextmanager
def computing(threads: int) -> Iterator[None]:
    """Have torch compute with so many threads meanwhile."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def learn(
    model: Any,
    tokenizer: Any,
    rows: Iterator[Row],
    steps: int,
    batch: int,
    *,
    ends: bool,
    peak: float = _LEARNING_RATE,
) -> None:
    """Train `model` in place on `steps` batches of rows.

    Args:
        ends: an end-of-text token is learned behind every row.
        peak: the learning rate between its rise and its fall.
    """
    optimizers = _optimizers(model, peak)

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


def _optimizers(model: Any, peak: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, which need a third of AdamW's steps; AdamW else."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "layers" in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "layers" not in n]
    return [Muon(matrices, peak), torch.optim.AdamW(others, lr=peak, betas=(0.9, 0.95))]


class Muon(torch.optim.Optimizer):
    """`torch.optim.Muon` in float32, with `match_rms_adamw`.

    That one multiplies in bfloat16, which a CPU without instructions for it emulates: there it
    takes twice as long as forward and backward pass together.
    """

    def __init__(
        self, params: list[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.1
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move every matrix that has a gradient."""
        for group in self.param_groups:
            for matrix in group["params"]:
                state = self.state[matrix]
                mean = state.setdefault("momentum", torch.zeros_like(matrix))
                mean.lerp_(matrix.grad, 1 - group["momentum"])
                update = orthogonal(matrix.grad.lerp(mean, group["momentum"]))
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                matrix.add_(update, alpha=-0.2 * max(matrix.shape) ** 0.5 * group["lr"])


def orthogonal(matrix: Tensor) -> Tensor:
    """The nearest matrix whose singular values are 1, roughly: five steps of Newton and Schulz.

    The coefficients are those of Keller Jordan's Muon, which leave values of 0.7 to 1.2.
    """
    a, b, c = 3.4445, -4.775, 2.0315
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    wide = wide / wide.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = wide @ wide.T
        wide = a * wide + (b * gram + c * gram @ gram) @ wide
    return wide if matrix.shape[0] <= matrix.shape[1] else wide.T


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
