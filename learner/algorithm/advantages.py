"""The baseline axis: rewards of a group of completions -> one advantage a completion.

All functions are pure and work in float64. A completion without a reward (NaN: its verifier gave
`error` or `timeout`) takes no part: it enters no mean and is not kept.

Legend: B completions of the batch, V of them with a reward, P groups, G completions of one group.
Evidence: [P] paper or official code, [R] reviewer, [3P] third parties, [D] derived, [I] inferred.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from common.config.algorithm import BaselineConfig
from common.errors import VerifierError
from learner.algorithm.axis import Axis, Rule, number_problem, tensor_problem
from learner.algorithm.baselines import MORE_BASELINES
from learner.algorithm.grouped import Advantages, GroupedRewards, RewardPart


def check_rewards(rewards: Tensor, verifier_name: str) -> None:
    """Raise `VerifierError` naming the verifier when any reward is NaN or infinite."""
    wrong = (~rewards.isfinite()).nonzero().flatten()
    if wrong.numel():
        first = int(wrong[0])
        raise VerifierError(
            f"verifier {verifier_name!r} returned {float(rewards[first])} as reward of completion "
            f"{first} ({wrong.numel()} of {rewards.numel()} rewards are not finite). A verifier "
            "must return a finite number, or raise, so that the completion is left out of training"
        )


def _grpo(grouped: GroupedRewards, config: BaselineConfig) -> Advantages:
    """(R - mean) / (std + epsilon), arXiv 2402.03300 [P].

    The paper writes std without saying which; the implementations in use take the sample standard
    deviation (divisor G - 1, `torch.std`), and so does this. Uniform groups give zeros.
    """
    return Advantages(grouped.centred_V / (grouped.deviation_V + config.epsilon))


def _dr_grpo(grouped: GroupedRewards, config: BaselineConfig) -> Advantages:
    """R - mean, arXiv 2503.20783 [P]."""
    return Advantages(grouped.centred_V)


def _rloo(grouped: GroupedRewards, config: BaselineConfig) -> Advantages:
    """R minus the mean of the others, = (R - mean) G / (G - 1); zero in a group of one.

    arXiv 2402.14740 [P].
    """
    size_V = grouped.size_V
    return Advantages(grouped.centred_V * size_V / (size_V - 1).clamp(min=1))


KALMAN_PROCESS_NOISE = 1e-5
KALMAN_MEASUREMENT_NOISE = 1e-2


def _krpo(grouped: GroupedRewards, config: BaselineConfig) -> Advantages:
    """Scalar Kalman filter over the rewards of a group in order, arXiv 2505.07527 [P].

    x0 = 0, P0 = 1, Q = 1e-5, R = 1e-2; A_i = (R_i - x_i) / (sqrt(P_i) + 1e-8) with the state
    after R_i. The filter starts from 0, so uniform groups of non-zero reward keep a small signal.
    """
    states: dict[int, tuple[float, float]] = {}
    advantages = []
    pairs = zip(grouped.group_V.tolist(), grouped.rewards_V.tolist(), strict=True)
    for group, reward in pairs:
        mean, variance = states.get(group, (0.0, 1.0))
        variance += KALMAN_PROCESS_NOISE
        gain = variance / (variance + KALMAN_MEASUREMENT_NOISE)
        mean += gain * (reward - mean)
        variance *= 1.0 - gain
        states[group] = (mean, variance)
        advantages.append((reward - mean) / (variance**0.5 + 1e-8))
    return Advantages(grouped.rewards_V.new_tensor(advantages))


def _raft(grouped: GroupedRewards, config: BaselineConfig) -> Advantages:
    """A = R on completions of positive reward, the others dropped, arXiv 2504.11343 [P]."""
    return Advantages(grouped.rewards_V, grouped.rewards_V > 0)


def _reinforce_rej(grouped: GroupedRewards, config: BaselineConfig) -> Advantages:
    """A = R, prompts answered all right or all wrong dropped, arXiv 2504.11343 [P].

    With graded rewards "all right or all wrong" is read as: all rewards of the group equal [I].
    """
    return Advantages(grouped.rewards_V, ~grouped.uniform_V)


def _none(grouped: GroupedRewards, config: BaselineConfig) -> Advantages:
    """A = R (REINFORCE)."""
    return Advantages(grouped.rewards_V)


def _made_up(rewards: list[float], groups: list[int]) -> GroupedRewards:
    rewards_V = torch.tensor(rewards, dtype=torch.float64)
    lengths_V = torch.arange(1, len(rewards) + 1)
    return GroupedRewards(rewards_V, torch.tensor(groups).long(), lengths_V)


def _problem(grouped: GroupedRewards, found: Advantages) -> str | None:
    wrong = tensor_problem("advantages_V", found.advantages_V, grouped.rewards_V)
    if wrong is None and found.kept_V is not None:
        wrong = tensor_problem("kept_V", found.kept_V, grouped.rewards_V, boolean=True)
    return wrong or number_problem(found.metrics)


BASELINES: Axis[GroupedRewards, BaselineConfig, Advantages] = Axis(
    name="baseline",
    inputs=GroupedRewards,
    result=Advantages,
    rules={
        "grpo": _grpo,
        "dr_grpo": _dr_grpo,
        "rloo": _rloo,
        "krpo": _krpo,
        "raft": _raft,
        "reinforce_rej": _reinforce_rej,
        "none": _none,
        **MORE_BASELINES,
    },
    cases={
        "groups of rewards (0, 1, 1) and (1)": partial(_made_up, [0, 1, 1, 1], [0, 0, 0, 1]),
        "a group of rewards (1, 1)": partial(_made_up, [1, 1], [0, 0]),
        "no completion with a reward": partial(_made_up, [], []),
    },
    problem=_problem,
    whole_batch=True,
)


def group_advantages(
    rewards_B: Tensor,
    group_B: Tensor,
    lengths_B: Tensor,
    config: BaselineConfig,
    rule: Rule[GroupedRewards, Advantages],
    parts: Sequence[RewardPart] = (),
    scores_B: Tensor | None = None,
    compared_B: Tensor | None = None,
) -> tuple[Tensor, Tensor, Mapping[str, float]]:
    """Advantages of a batch under `rule`, which is the one that `config` names.

    Args:
        rewards_B: NaN where a completion has no reward.
        group_B: long, the index of each completion's group, in any order.
        lengths_B: long, all tokens of each completion.
        parts: what the rewards are the weighted sum of, [B] each.
        scores_B: mean log-probability of each completion's tokens.
        compared_B: bool, completions that others are compared with; they are not kept.

    Returns:
        Advantages [B] float64; [B] bool, whether the completion belongs to the batch at all; and
        the rule's metrics. Where the second is False (no reward, or rejected by the baseline) the
        advantage is 0 and the completion counts in no denominator. `config.min_advantage` clamps
        advantages from below (GRPO-lambda: -0.1 [R]).
    """
    valid_B = ~rewards_B.isnan()
    grouped = GroupedRewards(
        rewards_B[valid_B].double(),
        group_B[valid_B],
        lengths_B[valid_B],
        tuple(RewardPart(part.values[valid_B].double(), part.weight) for part in parts),
        None if scores_B is None else scores_B[valid_B].double(),
        None if compared_B is None else compared_B[valid_B],
    )
    found = BASELINES.call(rule, config.kind, grouped)
    advantages_V = found.advantages_V.double()
    kept_V = torch.ones_like(grouped.group_V, dtype=torch.bool)
    if found.kept_V is not None:
        kept_V = found.kept_V
    if grouped.compared_V is not None:
        kept_V = kept_V & ~grouped.compared_V
    if config.min_advantage is not None:
        advantages_V = advantages_V.clamp(min=config.min_advantage)
    advantages_B = torch.zeros_like(rewards_B, dtype=torch.float64)
    advantages_B[valid_B] = advantages_V.masked_fill(~kept_V, 0.0)
    kept_B = torch.zeros_like(valid_B)
    kept_B[valid_B] = kept_V
    return advantages_B, kept_B, found.metrics


def kl_penalised_rewards(rewards_B: Tensor, log_ratio_sums_B: Tensor, beta: float) -> Tensor:
    """R - beta * sum_t (log mu - log pi_ref): the KL term inside the reward, not the loss [D].

    mu is the policy that sampled, so the sum is the unbiased one-sample (k1) estimate of the
    completion's KL divergence, in nats.
    """
    return rewards_B - beta * log_ratio_sums_B
