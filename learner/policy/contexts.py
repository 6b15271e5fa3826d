"""The completions of a step behind other prompts, for a scorer to read (`common.config.contexts`).

Token ids of contexts are in the log. The one hole that is filled here is a right sibling's: its
tokens as they were sampled, but for the one that ended it. So nothing is tokenised again, and a
replay reads what the run read.

Shapes: B completions of the step.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from common.config.contexts import HOLE
from common.errors import UserError
from learner.policy.step_batch import Ints, Sequences, StepBatch

Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class InContext:
    """What a scorer reads."""

    batch: StepBatch
    scored_B: Bools
    """Whether there is a context for the completion. The others stand behind their own prompt."""
    missing: int
    """Completions without a context."""
    too_long: int
    """Completions that do not fit behind their context into the model's."""


def in_context(
    batch: StepBatch, *, sibling: bool, sibling_reward: float, max_length: int
) -> InContext:
    """Put every completion behind its context.

    Args:
        sibling: whether a hole is for a right completion of the group, of at least the reward
            `sibling_reward`; otherwise a hole that is left means that there is no context.

    Raises:
        UserError: the run that made the batch made no contexts.
    """
    if batch.contexts is None:
        raise UserError(
            "algorithm.advantage.context: the groups have no contexts on record, since the run "
            "that sampled them had none: set it to prompt, or sample anew"
        )
    shown = siblings(batch, sibling_reward) if sibling else np.full(len(batch.group_B), -1)
    prompts, known = list(batch.prompts), dict[bytes, int]()
    prompt_B, scored_B = batch.group_B.copy(), np.zeros(len(shown), np.bool_)
    missing = too_long = 0
    for completion, context in enumerate(batch.contexts):
        ids = _filled(batch, context, int(shown[completion]))
        if not len(ids) or (ids == HOLE).any():
            missing += 1
        elif len(ids) + batch.lengths_B[completion] > max_length:
            too_long += 1
        else:
            place = known.setdefault(ids.tobytes(), len(prompts))
            if place == len(prompts):
                prompts.append(ids)
            prompt_B[completion], scored_B[completion] = place, True
    sequences = Sequences(batch.offsets, np.arange(len(shown)), prompt_B)
    moved = replace(batch, prompts=tuple(prompts), segmented=sequences)
    return InContext(moved, scored_B, missing, too_long)


def siblings(batch: StepBatch, least: float) -> Ints:
    """For every completion another of its group with the highest reward, [B]; -1 for none.

    Of several it is the first. A reward below `least` is no success.
    """
    found = np.full(len(batch.group_B), -1, np.int64)
    rewards_B = np.where(batch.rewards_B >= least, batch.rewards_B, -np.inf)  # NaN is below
    for group in np.unique(batch.group_B):
        members = np.flatnonzero(batch.group_B == group)
        for completion in members:
            others = members[members != completion]
            if len(others) and rewards_B[others].max() > -np.inf:
                found[completion] = others[int(rewards_B[others].argmax())]
    return found


def _filled(batch: StepBatch, context: Ints, shown: int) -> Ints:
    """`context` with the tokens of the completion `shown` in its hole; as it is for -1."""
    if shown < 0:
        return context
    said = batch.token_ids[batch.tokens_of(shown)]
    if not batch.truncated_B[shown]:
        said = said[:-1]  # what ended it would end the turn that it stands in
    (places,) = np.nonzero(context == HOLE)
    if not len(places):
        return context
    return np.concatenate([context[: places[0]], said, context[places[0] + 1 :]])
