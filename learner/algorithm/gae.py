"""Generalised advantage estimation: what a critic's values make of the rewards.

V(s_t) is what the critic says before token t is sampled. A state behind the last token is worth 0,
also where a limit cut the completion short. Only sampled tokens are actions: what was given between
them, as the answer of a tool, is a part of the next state.

Legend: B completions, M their sampled tokens back to back, N all their tokens, U turns.
Evidence: [P] paper or official code, [3P] third parties, [D] derived.
"""

from __future__ import annotations

import torch
from torch import Tensor

from learner.algorithm.rewarded import StepTokens, Turns
from learner.algorithm.traces import PackedAxis, linear_recurrence


def generalised_advantages(
    rewards_M: Tensor, values_M: Tensor, axis: PackedAxis, gamma: float, lambda_B: Tensor
) -> Tensor:
    """A_t = sum_l (gamma lambda)^l delta_{t+l}, arXiv 1506.02438 [P], [M] float64.

    delta_t = r_t + gamma V(s_{t+1}) - V(s_t). With lambda = 1 it is the discounted return less
    V(s_t), with lambda = 0 it is delta_t.
    """
    values_M, rewards_M = values_M.double(), rewards_M.double()
    _, lasts = axis.ends
    goes_on_M = torch.ones_like(values_M)
    goes_on_M[lasts] = 0.0
    next_M = torch.cat([values_M[1:], values_M.new_zeros(min(1, len(values_M)))]) * goes_on_M
    errors_M = rewards_M + gamma * next_M - values_M
    decays_M = gamma * axis.spread(lambda_B.double()) * goes_on_M
    return linear_recurrence(errors_M.flip(0), decays_M.flip(0)).flip(0)


def length_adaptive(lengths_B: Tensor, alpha: float) -> Tensor:
    """Lambda of completions of l tokens, 1 - 1 / (alpha l), VAPO, arXiv 2504.05118 [3P].

    Below 1 / alpha tokens it would be negative, and is 0 [D].
    """
    return (1.0 - 1.0 / (alpha * lengths_B.double().clamp(min=1))).clamp(min=0.0)


def token_rewards(tokens: StepTokens, turns: Turns, rewards_U: Tensor) -> Tensor:
    """The reward of every turn at the last token that was sampled in it, [N] float64; else 0."""
    rewards_N = torch.zeros(len(tokens.token_ids_N), dtype=torch.float64)
    sampled = (turns.turn_N >= 0).nonzero()[:, 0]
    first_B = turns.count_B.cumsum(0) - turns.count_B
    turn_of_M = first_B[tokens.axis.completion_N[sampled]] + turns.turn_N[sampled]
    last_M = torch.ones_like(sampled, dtype=torch.bool)
    last_M[:-1] = turn_of_M[1:] != turn_of_M[:-1]
    rewards_N[sampled[last_M]] = rewards_U[turn_of_M[last_M]]
    return rewards_N


def whitened(values_N: Tensor, counted_N: Tensor) -> Tensor:
    """(x - mean) / deviation over the tokens that count, as verl and OpenRLHF do it [3P].

    Fewer than two values have nothing to be compared with: they are 0.
    """
    counted = values_N[counted_N]
    if len(counted) < 2:
        return torch.zeros_like(values_N)
    return (values_N - counted.mean()) / (counted.var() + 1e-8).sqrt()


def value_losses(values_N: Tensor, old_N: Tensor, returns_N: Tensor, clip: float) -> Tensor:
    """Loss of every value V, max((V - G)^2, (V' - G)^2) / 2, V' within `clip` of the old [P].

    The clip of PPO's code: a token whose value moved further than that towards its return has no
    gradient. `.inf` clips nothing.
    """
    near_N = old_N + (values_N - old_N).clamp(-clip, clip)
    return 0.5 * torch.maximum((values_N - returns_N) ** 2, (near_N - returns_N) ** 2)


def explained_variance(values_N: Tensor, returns_N: Tensor) -> float:
    """1 - var(G - V) / var(G); 1 is a critic that knows, 0 one that says the same everywhere.

    Returns that are all equal have nothing to explain: 0.
    """
    if len(returns_N) < 2 or float(returns_N.var()) == 0.0:
        return 0.0
    return 1.0 - float((returns_N - values_N).var() / returns_N.var())
