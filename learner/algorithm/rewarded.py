"""What a recipe is given of a step: rewards, lengths, and the tokens that may differ in advantage.

Legend: B completions of the step, U turns of all of them, N all their tokens back to back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from learner.algorithm.grouped import RewardPart
from learner.algorithm.traces import PackedAxis


@dataclass(frozen=True)
class Turns:
    """The turns of the step's episodes, completion after completion, in their order."""

    completion_U: Tensor
    """Completion that each turn belongs to, long, ascending."""
    number_U: Tensor
    """Place of the turn in its episode, long, from 0."""
    turn_N: Tensor
    """Place of the token's turn in its episode, long; -1 where the token was given."""
    rewards_U: Tensor
    """Reward of the turn alone, float64; 0 where the environment gave none."""
    states_U: Tensor
    """The state that the policy was in, as a number, long; -1 where the environment named none.
    Turns of one group with the same number were in the same state."""

    @cached_property
    def count_B(self) -> Tensor:
        """Turns of each completion, up to the last that has any."""
        return torch.bincount(self.completion_U)


@dataclass(frozen=True)
class Branches:
    """Measured values of prefixes, completion after completion, by the tokens before them.

    Branches that no verifier could judge are not among them.
    """

    completion_V: Tensor
    """Completion that each value belongs to, long, ascending."""
    at_V: Tensor
    """Tokens of the completion before the branch, long; 0 is its start."""
    values_V: Tensor
    """Mean reward of what went on from there, float64."""


@dataclass(frozen=True)
class Trees:
    """Which completions go on from inside of others, so that a group is a tree; all [B]."""

    parent_B: Tensor
    """The completion whose first tokens the completion was given, long: one before it, of its
    group. -1 where it begins at the prompt."""
    given_B: Tensor
    """How many tokens that are, long."""


@dataclass(frozen=True)
class StepTokens:
    """The tokens of a step."""

    axis: PackedAxis
    """All tokens of each completion."""
    token_ids_N: Tensor  # long
    loss_mask_N: Tensor  # bool
    behaviour_logprobs_N: Tensor  # float32, nats; NaN where the token was given
    turns: Turns | None = None
    """None where every completion is one turn."""
    scores_N: Tensor | None = None
    """Log-probability of each token under the scorer, float32, nats; None where there is none."""
    values_N: Tensor | None = None
    """The critic's value of the state before each token, float32; None without a critic."""
    own_N: Tensor | None = None
    """Log-probability under the policy before the step, where scores are compared with it."""
    branches: Branches | None = None
    """None where no completion has any."""
    trees: Trees | None = None
    """None where every completion begins at the prompt."""


@dataclass(frozen=True)
class Rewarded:
    """The completions of a step and their rewards; all [B].

    The optional columns stand for completions that are whole, and of which every token is in the
    loss.
    """

    rewards_B: Tensor
    """Float64; NaN where a completion has none: it is in no baseline and no denominator."""
    group_B: Tensor
    """Index of each completion's group, long."""
    lengths_B: Tensor
    """Tokens of each completion that are in the loss, long."""
    verifier_name: str = "verifier"
    """Who gave the rewards: an error about one names it."""
    sampled_lengths_B: Tensor | None = None
    """Tokens of each completion that the policy sampled, long."""
    truncated_B: Tensor | None = None
    """Whether a limit cut the completion short, bool."""
    tokens: StepTokens | None = None
    """What rules of the advantage axis need that tell tokens apart."""
    parts: Sequence[RewardPart] = ()
    """What `rewards_B` is the weighted sum of, a verifier each; nothing where that is not known."""
    compared_B: Tensor | None = None
    """Whether the completion is there for others to compare with alone, bool."""
    scores_B: Tensor | None = None
    """Mean log-probability of each completion's tokens under the policy that sampled them."""
    scored_B: Tensor | None = None
    """Whether a scorer could read the completion, bool: one that it could not is not trained on,
    and others are compared with it all the same."""
    step: int = 0
    """Learner steps of the run before this one. A schedule goes by it alone, so that a step is the
    same again after a resume and in a replay."""
