"""The advantage axis: from the advantage of a completion to that of every token, before credit.

`algorithm.advantage.kind` names a rule of this table, or `package.module:function`: a function of
(`AdvantageInputs`, `AdvantageConfig`) that returns `TokenAdvantages`. It sees the whole batch and
works in float64. Advantages may differ in sign inside a completion: every clip goes by the sign of
its token's own.

    completion    A_i for every token of completion i (GRPO and all of its line)
    turn_return   what the episode brings from the token's turn on, against turns of its group
    turn_anchor   A_i, and the return of the turn against turns that were in the same state (GiGPO)
    turn_outcome  A_i, and before the last turn the turn's own reward (MT-GRPO)
    prefix_values A_i, and what the group's reward does at the token of its prefix trie (TEMPO)
    key_tokens    A_i, and how far the token goes with right answers of the group (KTAE)
    distill       how much likelier the token is to the scorer, with or without A_i (OPD)
    flow          A_i, and how far the completion's distance from the scorer is off (FlowRL)
    gae           what the rewards from the token on bring beyond a critic's value (PPO, VAPO)
    evidence      A_i, more where the scorer agrees with its sign at the token (RLSD)
    reference_progress  A_i, and how far the policy has moved off the reference so far (SPRO)
    branch_values  what the value that branches have measured gains in the segment (VinePPO, SPO)
    tree_values   what the value of a node gains over that of its parent (SPO's tree)

Legend: B completions, U turns, N all tokens. Evidence: [P] paper, [3P] third parties, [D] derived.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from common.config.algorithm import AdvantageConfig
from common.config.bounds import NotNegative, Positive, Share
from learner.algorithm import scored
from learner.algorithm.advantage_inputs import AdvantageInputs, TokenAdvantages
from learner.algorithm.axis import Axis, number_problem, tensor_problem
from learner.algorithm.branches import branch_values
from learner.algorithm.gae import (
    generalised_advantages,
    length_adaptive,
    token_rewards,
    whitened,
)
from learner.algorithm.group_tokens import key_values, prefix_steps
from learner.algorithm.grouped import deviation
from learner.algorithm.rewarded import Branches, StepTokens, Trees, Turns
from learner.algorithm.traces import PackedAxis
from learner.algorithm.trees import tree_values

TokenIds = Sequence[Sequence[int]]
"""Tokens of the completions of a group."""


def _completion(inputs: AdvantageInputs, config: AdvantageConfig) -> TokenAdvantages:
    return TokenAdvantages(inputs.tokens.axis.spread(inputs.advantages_B))


def _turn_return(
    inputs: AdvantageInputs, config: AdvantageConfig, *, gamma: Share = 1.0
) -> TokenAdvantages:
    """The baseline over G_ij = sum_{l>=j} gamma^(l-j) r_il, among turns j of the group [D].

    r_il is the reward of turn l; what the episode's reward has beyond those of its turns is earned
    in the last. A turn that fewer than two episodes of the group reached has nothing to be compared
    with: 0. Without rewards of turns and with gamma = 1 it is `completion` as long as all episodes
    of the group last.
    """
    turns = inputs.turns
    returns_U = turn_returns(inputs, turns, gamma)
    place_U = turns.number_U + (turns.number_U.max() + 1) * inputs.group_B[turns.completion_U]
    return _of_turns(inputs, turns, _compared(inputs, turns, returns_U, place_U))


def _turn_anchor(
    inputs: AdvantageInputs,
    config: AdvantageConfig,
    *,
    gamma: Share = 0.95,
    weight: NotNegative = 1.0,
) -> TokenAdvantages:
    """A_i + weight * A^S, A^S the baseline over returns of turns in one state, GiGPO [P].

    arXiv 2505.10978. The states are those that the environment names; a state that occurs once in
    its group, or has no name, gives 0. `gamma` discounts the return of a turn.
    """
    turns = inputs.turns
    returns_U = turn_returns(inputs, turns, gamma)
    group_U = inputs.group_B[turns.completion_U]
    pairs = torch.stack([group_U, turns.states_U], dim=1)
    _, state_U = torch.unique(pairs, dim=0, return_inverse=True)
    alone_U = turns.states_U < 0
    # A turn without a named state is a state of its own.
    state_U = torch.where(alone_U, len(state_U) + torch.arange(len(state_U)), state_U)
    step_U = _compared(inputs, turns, returns_U, state_U)
    return _of_turns(inputs, turns, inputs.advantages_B[turns.completion_U] + weight * step_U)


def _turn_outcome(
    inputs: AdvantageInputs, config: AdvantageConfig, *, weight: NotNegative = 1.0
) -> TokenAdvantages:
    """A_i in the last turn; before it weight * A_i and the baseline over rewards of the turn [P].

    MT-GRPO, arXiv 2505.11821, for any number of turns: its formula is for two. `weight` is its
    lambda. Rewards of turns are compared among the same turn of a group.
    """
    turns = inputs.turns
    place_U = turns.number_U + (turns.number_U.max() + 1) * inputs.group_B[turns.completion_U]
    own_U = _compared(inputs, turns, turns.rewards_U, place_U)
    outcome_U = inputs.advantages_B[turns.completion_U]
    last_U = turns.number_U == turns.count_B[turns.completion_U] - 1
    return _of_turns(inputs, turns, torch.where(last_U, outcome_U, weight * outcome_U + own_U))


def _prefix_values(
    inputs: AdvantageInputs,
    config: AdvantageConfig,
    *,
    weight: NotNegative = 1.0,
    epsilon: Positive = 1e-6,
) -> TokenAdvantages:
    """A_i + weight * (V(o_<=t) - V(o_<t)) / (std R + epsilon), TEMPO, arXiv 2509.18314 [P].

    V is the mean reward of the group's completions that share the prefix. Behind the last branch
    it is `completion`.
    """

    def extra(ids: TokenIds, rewards_G: Tensor) -> Tensor:
        scale = weight / (float(deviation(rewards_G)) + epsilon)
        return scale * torch.tensor(prefix_steps(ids, rewards_G.tolist()), dtype=torch.float64)

    return _with_extra(inputs, extra)


def _key_tokens(
    inputs: AdvantageInputs, config: AdvantageConfig, *, weight: NotNegative = 1.0
) -> TokenAdvantages:
    """A_i + weight * key of the token, KTAE, arXiv 2505.16826 [P], without its frequencies.

    Right is a completion whose reward is above its group's mean, as 1 is among 0 and 1 [I].
    """

    def extra(ids: TokenIds, rewards_G: Tensor) -> Tensor:
        right = (rewards_G > rewards_G.mean()).tolist()
        return weight * torch.tensor(key_values(ids, right), dtype=torch.float64)

    return _with_extra(inputs, extra)


def _with_extra(
    inputs: AdvantageInputs, extra: Callable[[TokenIds, Tensor], Tensor]
) -> TokenAdvantages:
    """A_i, and what `extra` gives the tokens of each group by their ids and the rewards."""
    lengths = inputs.tokens.axis.lengths_B.tolist()
    ids = [part.tolist() for part in inputs.tokens.token_ids_N.split(lengths)]
    extra_N = torch.zeros(sum(lengths), dtype=torch.float64)
    own = extra_N.split(lengths)  # views, a completion each
    for group in inputs.group_B[inputs.kept_B].unique().tolist():
        members = ((inputs.group_B == group) & inputs.kept_B).nonzero()[:, 0].tolist()
        found_N = extra([ids[m] for m in members], inputs.rewards_B[members])
        for member, part in zip(members, found_N.split([lengths[m] for m in members]), strict=True):
            own[member].copy_(part)
    return TokenAdvantages(inputs.tokens.axis.spread(inputs.advantages_B) + extra_N)


def _gae(
    inputs: AdvantageInputs,
    config: AdvantageConfig,
    *,
    gamma: Share = 1.0,
    lambda_: Share = 0.95,
    length_alpha: NotNegative = 0.0,
    whiten: bool = True,
) -> TokenAdvantages:
    """Generalised advantages of the critic's values, PPO; see `learner.algorithm.gae`.

    Rewards are those of the episodes as they are. With `length_alpha` lambda follows the length of
    the completion (VAPO). The critic learns the returns under its own `critic.lambda_`.
    """
    tokens, turns = inputs.tokens, inputs.turns
    assert tokens.values_N is not None  # the configuration holds rule and critic together
    given_N = tokens.behaviour_logprobs_N.isnan()
    rewards_N = token_rewards(tokens, turns, turn_rewards(inputs, turns))
    lengths_B = tokens.axis.sum(~given_N).long()
    axis, values_M = PackedAxis(lengths_B), tokens.values_N[~given_N].double()
    rewards_M = rewards_N[~given_N].nan_to_num(nan=0.0)  # an episode without one does not count

    def over_all(lambda_B: Tensor) -> Tensor:
        found_N = torch.zeros_like(rewards_N)
        found_N[~given_N] = generalised_advantages(rewards_M, values_M, axis, gamma, lambda_B)
        return found_N

    constant_B = torch.full(lengths_B.shape, lambda_, dtype=torch.float64)
    advantages_N = over_all(
        length_adaptive(lengths_B, length_alpha) if length_alpha else constant_B
    )
    returns_N = over_all(torch.full_like(constant_B, config.critic.lambda_))
    returns_N[~given_N] += values_M
    counted_N = tokens.axis.spread(inputs.kept_B) & tokens.loss_mask_N & ~given_N
    if whiten:
        advantages_N = whitened(advantages_N, counted_N)
    return TokenAdvantages(advantages_N.masked_fill(given_N, 0.0), returns_N=returns_N)


def turn_rewards(inputs: AdvantageInputs, turns: Turns) -> Tensor:
    """The reward of every turn, [U] float64; NaN in an episode without a reward.

    What the episode's reward has beyond those of its turns is earned in the last.
    """
    last_U = turns.number_U == turns.count_B[turns.completion_U] - 1
    of_turns_B = torch.zeros_like(inputs.rewards_B)
    of_turns_B = of_turns_B.index_add(0, turns.completion_U, turns.rewards_U)
    rest_U = (inputs.rewards_B - of_turns_B)[turns.completion_U]
    return turns.rewards_U + torch.where(last_U | rest_U.isnan(), rest_U, 0.0)


def turn_returns(inputs: AdvantageInputs, turns: Turns, gamma: float) -> Tensor:
    """Return sum_{l>=j} gamma^(l-j) r_il of every turn j of episode i, [U] float64.

    It is NaN in an episode without a reward. r_il is the reward of turn l (`turn_rewards`). So with
    gamma = 1 the return of the first turn is the episode's reward.
    """
    last_U = turns.number_U == turns.count_B[turns.completion_U] - 1
    rewards_U = turn_rewards(inputs, turns)
    returns_U = rewards_U.clone()
    for number in range(int(turns.number_U.max()) - 1, -1, -1):
        here = ((turns.number_U == number) & ~last_U).nonzero()[:, 0]
        returns_U[here] += gamma * returns_U[here + 1]  # the next turn of the same episode
    return returns_U


def _compared(inputs: AdvantageInputs, turns: Turns, values_U: Tensor, place_U: Tensor) -> Tensor:
    """The baseline over `values_U` among turns of one place that count; alone, a turn has 0."""
    counted_U = inputs.kept_B[turns.completion_U] & ~values_U.isnan()
    _, place_V, size = torch.unique(place_U[counted_U], return_inverse=True, return_counts=True)
    lengths_U = _turn_lengths(inputs.tokens, turns)
    compared_U = torch.zeros_like(values_U)
    found_V = inputs.baseline(values_U[counted_U], place_V, lengths_U[counted_U])
    compared_U[counted_U] = found_V.masked_fill(size[place_V] < 2, 0.0)
    return compared_U


def _turn_lengths(tokens: StepTokens, turns: Turns) -> Tensor:
    """Tokens of each turn, [U] long."""
    sampled_N = turns.turn_N >= 0
    first_B = turns.count_B.cumsum(0) - turns.count_B
    turn_of_N = first_B[tokens.axis.completion_N[sampled_N]] + turns.turn_N[sampled_N]
    return torch.bincount(turn_of_N, minlength=len(turns.completion_U))


def _of_turns(inputs: AdvantageInputs, turns: Turns, advantages_U: Tensor) -> TokenAdvantages:
    """Give every token the advantage of its turn, and a given one that of its completion."""
    advantages_N = inputs.tokens.axis.spread(inputs.advantages_B).clone()
    sampled_N = turns.turn_N >= 0
    first_B = turns.count_B.cumsum(0) - turns.count_B
    turn_of_N = first_B[inputs.tokens.axis.completion_N[sampled_N]] + turns.turn_N[sampled_N]
    advantages_N[sampled_N] = advantages_U[turn_of_N]
    return TokenAdvantages(advantages_N)


def _made_up(lengths: list[int]) -> AdvantageInputs:
    """Two completions of a group, with one turn each."""
    axis = PackedAxis(torch.tensor(lengths))
    count, total = len(lengths), sum(lengths)
    rewards_B = torch.arange(count, dtype=torch.float64)
    tokens = StepTokens(
        axis,
        torch.arange(total),
        torch.ones(total, dtype=torch.bool),
        torch.full((total,), -1.0),
        scores_N=torch.full((total,), -1.5),
        values_N=torch.full((total,), 0.25),
        branches=_made_up_branches() if total else None,
        trees=Trees(torch.tensor([-1, 0]), torch.tensor([0, 1])) if count == 2 else None,
    )
    return AdvantageInputs(
        advantages_B=rewards_B - rewards_B.mean() if count else rewards_B,
        rewards_B=rewards_B,
        group_B=torch.zeros(count, dtype=torch.long),
        kept_B=torch.ones(count, dtype=torch.bool),
        tokens=tokens,
        baseline=lambda values, groups, lengths: values - values.mean(),
    )


def _made_up_branches() -> Branches:
    """One, before the second token of the first completion."""
    return Branches(torch.tensor([0]), torch.tensor([1]), torch.tensor([0.5], dtype=torch.float64))


def _problem(inputs: AdvantageInputs, found: TokenAdvantages) -> str | None:
    like_N = inputs.tokens.behaviour_logprobs_N
    wrong = tensor_problem("advantages_N", found.advantages_N, like_N)
    if wrong is None and found.counted_N is not None:
        wrong = tensor_problem("counted_N", found.counted_N, like_N, boolean=True)
    return wrong or number_problem(found.metrics)


ADVANTAGES: Axis[AdvantageInputs, AdvantageConfig, TokenAdvantages] = Axis(
    name="advantage",
    inputs=AdvantageInputs,
    result=TokenAdvantages,
    rules={
        "completion": _completion,
        "turn_return": _turn_return,
        "turn_anchor": _turn_anchor,
        "turn_outcome": _turn_outcome,
        "prefix_values": _prefix_values,
        "key_tokens": _key_tokens,
        "distill": scored.distill,
        "flow": scored.flow,
        "gae": _gae,
        "evidence": scored.evidence,
        "reference_progress": scored.reference_progress,
        "branch_values": branch_values,
        "tree_values": tree_values,
    },
    cases={
        "completions of [3, 1] tokens": partial(_made_up, [3, 1]),
        "a completion without a token": partial(_made_up, [0]),
    },
    problem=_problem,
    whole_batch=True,
)
