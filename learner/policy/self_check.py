"""The packed model against the untouched one of transformers, before a run.

The same random sequences are scored by the model as it was loaded, one plain sequence at a time,
and by the policy, in rows. Short ones stand in a row alone, and beside one that is longer than
every window and rotary range of the model that the run can reach. So a log-probability that
depends on its neighbours shows, as does a window that the learner does not know.

Shapes: N scored tokens.
"""

from __future__ import annotations

import inspect
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from common.errors import UserError
from learner.policy.packing import PackedRow, pack_row

_TOLERANCE = 2e-3
"""Nats a token in float32. Rounding stays below 1e-4; a missed scale, cap or mask is above 1e-2."""

HALF_TOLERANCE = 0.5
"""Nats a token in bfloat16."""

_LAST = (9, 4)
"""Lengths of the long sequence's completions; its prompt is as long as the range, at most."""

Group = tuple[np.ndarray, list[np.ndarray]]


class Scorer(Protocol):
    def logprobs(
        self, row: PackedRow, *, temperature: float, with_entropy: bool = False
    ) -> tuple[Tensor, Tensor]: ...


class SelfCheck:
    """Made with the untouched model; `gap` compares the policy with it."""

    def __init__(
        self, model: PreTrainedModel, temperature: float, reach: int, max_length: int
    ) -> None:
        """Score the sequences one by one.

        Args:
            reach: a range that one sequence shall exceed; 0 where none is to.
            max_length: no sequence is longer.
        """
        self._temperature = temperature
        vocabulary = model.get_input_embeddings().num_embeddings
        self._short = _short_groups(vocabulary)
        self._long = _long_group(vocabulary, min(reach + _LAST[0], max_length)) if reach else []
        model.eval()
        self._expected_N = _plain(model, self._short + self._long, temperature)

    @torch.no_grad()
    def gap(self, policy: Scorer, device: torch.device) -> float:
        """The largest difference of a token, in nats."""
        gaps = []
        for groups in (self._short, self._short + self._long):
            row = pack_row(groups, range(_count(groups)), device)
            found_N, _ = policy.logprobs(row, temperature=self._temperature)
            gaps.append((found_N.float() - self._expected_N[: len(found_N)]).abs().max())
        return float(torch.stack(gaps).max())


def check_row(model: PreTrainedModel) -> PackedRow:
    """The short sequences as one row."""
    groups = _short_groups(model.get_input_embeddings().num_embeddings)
    return pack_row(groups, range(_count(groups)), next(model.parameters()).device)


def check_policy(gap: float, dtype: torch.dtype, path: str) -> None:
    """Raise `UserError` when the self-check found different numbers."""
    tolerance = _TOLERANCE if dtype == torch.float32 else HALF_TOLERANCE
    if not gap <= tolerance:
        raise UserError(
            f"the packed forward pass of {path!r} disagrees with transformers' own by {gap:.3g} "
            f"nats (tolerance {tolerance}): this architecture does something to its logits or its "
            "attention that the learner does not know, or carries something from one sequence of "
            "a row to the next. Choose another model, or add its logit transformation to "
            "learner/policy/model.py"
        )


def _count(groups: list[Group]) -> int:
    return sum(len(completions) for _, completions in groups)


def _short_groups(vocabulary: int) -> list[Group]:
    random = np.random.default_rng(0)
    prompt, *completions = (random.integers(0, vocabulary, n) for n in (7, 5, 9, 1))
    return [(prompt, completions), (prompt, completions[:1])]


def _long_group(vocabulary: int, tokens: int) -> list[Group]:
    """A prompt with two completions, the longer of which ends after `tokens` tokens."""
    random = np.random.default_rng(1)
    prompt = random.integers(0, vocabulary, max(1, tokens - _LAST[0]))
    return [(prompt, [random.integers(0, vocabulary, n) for n in _LAST])]


@torch.no_grad()
def _plain(model: PreTrainedModel, groups: list[Group], temperature: float) -> Tensor:
    """[N] log-probabilities of all completions, a plain sequence at a time."""
    few = "logits_to_keep" in inspect.signature(model.forward).parameters
    parts = []
    for prompt, completions in groups:
        for completion in completions:
            ids = torch.from_numpy(np.concatenate([prompt, completion]))[None]
            kept = len(completion) + 1
            wanted: dict[str, Any] = {"logits_to_keep": kept} if few else {}
            logits = model(input_ids=ids, use_cache=False, **wanted).logits[0, -kept:-1].float()
            logprobs = (logits / temperature).log_softmax(dim=-1)
            parts.append(logprobs.gather(1, torch.from_numpy(completion)[:, None])[:, 0])
    return torch.cat(parts)
