"""Credit from a scorer: another model's log-probabilities of the sampled tokens.

log mu of the sampler is at hand, and stands for the policy [P]; or the policy scores too.

Legend: B completions of the step, N all their tokens. Evidence: [P] paper or official code,
[3P] third parties, [D] derived, [I] inferred.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from common.config.algorithm import AdvantageConfig
from common.config.bounds import Natural, NotNegative, Positive, Share
from learner.algorithm.advantage_inputs import AdvantageInputs, TokenAdvantages
from learner.algorithm.rewarded import StepTokens
from learner.algorithm.traces import PackedAxis


def distill(
    inputs: AdvantageInputs,
    config: AdvantageConfig,
    *,
    coefficient: NotNegative = 1.0,
    reward_weight: NotNegative = 0.0,
    proximal: Share = 1.0,
) -> TokenAdvantages:
    """OPD [P]: reward_weight * A_i - coefficient * (log mu - log pi_scorer) of each token.

    With the defaults the gradient is that of the divergence KL(pi || scorer) at every token.
    `proximal` is TOP-D's alpha; 1 is off.
    """
    a_N = reward_weight * inputs.tokens.axis.spread(inputs.advantages_B)
    return TokenAdvantages(a_N + coefficient * softened(log_ratio(inputs.tokens), proximal))


def flow(
    inputs: AdvantageInputs, config: AdvantageConfig, *, beta: Positive = 15.0
) -> TokenAdvantages:
    """A_i - (m_i - mean m) / beta, m_i the mean log mu - log pi_scorer of completion i [D].

    FlowRL, arXiv 2509.15207, without its head: the best log Z of a group is the mean of the rest
    of its residuals. Its gradient is 2 beta times this one.
    """
    far_B = centred_divergence(inputs.tokens, inputs.group_B, inputs.kept_B)
    return TokenAdvantages(inputs.tokens.axis.spread(inputs.advantages_B - far_B / beta))


def evidence(
    inputs: AdvantageInputs,
    config: AdvantageConfig,
    *,
    mix: Share = 0.5,
    bound: Share = 0.2,
    decay_steps: Natural = 0,
) -> TokenAdvantages:
    """A_i w_t, w_t above 1 where the scorer's log-ratio has the sign of A_i, RLSD [P].

    arXiv 2604.03128. Both 0.5 and 0.2 are the paper's; w_t is within 1 - mix * bound and
    1 + mix * bound. Over `decay_steps` the mix falls in a line to 0 and stays there; 0 keeps it,
    as the release does. Third parties have 50 [3P]; that it is a line is ours [I].
    """
    a_N = inputs.tokens.axis.spread(inputs.advantages_B)
    if decay_steps:
        mix *= max(0.0, 1 - inputs.step / decay_steps)
    return TokenAdvantages(a_N * evidence_weights(log_ratio(inputs.tokens), a_N, mix, bound))


def reference_progress(
    inputs: AdvantageInputs, config: AdvantageConfig, *, coefficient: NotNegative = 0.05
) -> TokenAdvantages:
    """A_i + coefficient * (R_t - the group's mean R_t), R_t = sum_{j<=t} log(pi / pi_ref) [R].

    SPRO, arXiv 2507.01551. Its coefficient is not published; 0.05 is ours.
    """
    axis = inputs.tokens.axis
    moved_N = progress(log_ratio(inputs.tokens), axis, inputs.group_B, inputs.kept_B)
    return TokenAdvantages(axis.spread(inputs.advantages_B) + coefficient * moved_N)


def log_ratio(tokens: StepTokens) -> Tensor:
    """Return log pi_scorer - log pi of every token, [N] float64; 0 where the token was given.

    log pi is the policy's where the learner has scored it, else log mu. It is 0 too where the
    scorer had nothing to read.
    """
    assert tokens.scores_N is not None  # the configuration holds rule and scorer together
    own_N = tokens.behaviour_logprobs_N if tokens.own_N is None else tokens.own_N
    gap_N = tokens.scores_N.double() - own_N.double()
    return gap_N.masked_fill(tokens.behaviour_logprobs_N.isnan() | tokens.scores_N.isnan(), 0.0)


def softened(log_ratio_N: Tensor, proximal: float) -> Tensor:
    """Return log(alpha rho + 1 - alpha), bounded below by log(1 - alpha); alpha 1 is log rho [3P].

    TOP-D, arXiv 2607.04751: without the bound a token that the scorer rejects has an advantage
    that goes to minus infinity.
    """
    if proximal == 1.0:
        return log_ratio_N
    if proximal == 0.0:
        return torch.zeros_like(log_ratio_N)
    rest_N = torch.full_like(log_ratio_N, math.log1p(-proximal))
    return torch.logaddexp(log_ratio_N + math.log(proximal), rest_N)


def centred_divergence(tokens: StepTokens, group_B: Tensor, kept_B: Tensor) -> Tensor:
    """Mean log mu - log pi_scorer of each completion less that of its group, [B] float64 [D].

    Means are over sampled tokens in the loss; the group's is over completions that count.
    """
    counted_N = tokens.loss_mask_N & ~tokens.behaviour_logprobs_N.isnan()
    axis: PackedAxis = tokens.axis
    sums_B = axis.sum(-log_ratio(tokens).masked_fill(~counted_N, 0.0))
    means_B = sums_B / axis.sum(counted_N).clamp(min=1)
    groups = int(group_B.max()) + 1 if len(group_B) else 0
    zeros = torch.zeros(groups, dtype=torch.float64)
    of_group = zeros.index_add(0, group_B, means_B * kept_B)
    of_group = of_group / zeros.index_add(0, group_B, kept_B.double()).clamp(min=1)
    return means_B - of_group[group_B]


def evidence_weights(log_ratio_N: Tensor, advantages_N: Tensor, mix: float, bound: float) -> Tensor:
    """Return w_t = 1 - mix + mix clip(exp(sign(A) log_ratio), 1 - bound, 1 + bound), RLSD [P].

    It is within 1 - mix * bound and 1 + mix * bound: no sign of an advantage ever changes.
    """
    ratio_N = (advantages_N.sign() * log_ratio_N).exp().clamp(1 - bound, 1 + bound)
    return 1 + mix * (ratio_N - 1)


def progress(log_ratio_N: Tensor, axis: PackedAxis, group_B: Tensor, kept_B: Tensor) -> Tensor:
    """Return sum_{j <= t} log(pi / pi_ref) less its mean over the group's members at t, [N] [R].

    SPRO, arXiv 2507.01551: members that have ended before t are not in the mean.
    """
    totals_N = torch.cat([-part.cumsum(0) for part in log_ratio_N.split(axis.lengths_B.tolist())])
    longest = int(axis.lengths_B.max()) if len(axis.lengths_B) else 0
    place_N = axis.spread(group_B) * max(1, longest) + axis.position_N
    counted_N = axis.spread(kept_B)
    size = (int(group_B.max()) + 1 if len(group_B) else 0) * max(1, longest)
    zeros = torch.zeros(size, dtype=torch.float64)
    sums = zeros.index_add(0, place_N, totals_N * counted_N)
    counts = zeros.index_add(0, place_N, counted_N.double()).clamp(min=1)
    return totals_N - (sums / counts)[place_N]
