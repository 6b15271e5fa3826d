"""The objective axis: log-ratio and advantage -> the surrogate of every token, to be maximised.

Every objective sees the log-ratio z of the credit axis (log pi - log pi_old, or its trace) and
returns a value a token. Those at sequence level give every token of a completion the same value,
so that a sum over tokens weighted by 1 / |o_i| is the sequence's own objective.

Legend: N trained tokens, B completions. Evidence tags: [P] paper, [D] derived.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated

import torch
from torch import Tensor

from common.config.algorithm import ObjectiveConfig
from common.config.bounds import Limit, NotNegative, Share, ShareBelowOne, above, or_infinite
from learner.algorithm.axis import Axis, tensor_problem, token_cases, token_metric_problem
from learner.algorithm.choices import TokenColumns, chooses, highest_covariance, some_in_band
from learner.algorithm.surrogates import Surrogate, Terms, bounded_exp, log_policy
from learner.algorithm.traces import PackedAxis
from learner.algorithm.trust_regions import disco, dppo, dro, sapo, vespo

DualClip = Annotated[float, or_infinite(above(1))]
"""`.inf` is off."""


def _clipped(log_ratio: Tensor, advantages: Tensor, config: ObjectiveConfig) -> Surrogate:
    ratio = bounded_exp(log_ratio)
    free = ratio * advantages
    bounded = ratio.clamp(1 - config.clip_low, 1 + config.clip_high) * advantages
    return Surrogate(torch.minimum(free, bounded), bounded < free)


def _ppo(terms: Terms, config: ObjectiveConfig, *, dual_clip: DualClip = math.inf) -> Surrogate:
    """min(r A, clip(r, 1 - low, 1 + high) A); low = high is PPO's, high > low DAPO's clip [P].

    `dual_clip` c bounds the surrogate of a negative advantage from below by c A (arXiv 1912.09729
    [P]; 3 in most libraries, 10 in DAPO's script). A bound on the ratio itself, TRL's `delta`, is
    the same for c of at least 1 + high [D].
    """
    found = _clipped(terms.log_ratio_N, terms.advantages_N, config)
    if math.isinf(dual_clip):
        return found
    floor_N = dual_clip * terms.advantages_N
    beyond_N = (terms.advantages_N < 0) & (found.values_N < floor_N)
    values_N = torch.where(beyond_N, floor_N, found.values_N)
    return Surrogate(values_N, found.clipped_N | beyond_N)


def _gspo(terms: Terms, config: ObjectiveConfig) -> Surrogate:
    """PPO's clip on s_i = (pi / pi_old)^(1/|o_i|), arXiv 2507.18071 [P].

    The gradient runs through s_i into every token of the completion. Where tokens differ in
    advantage it is GSPO-token [P]: every token has s_i as its ratio, and the gradient of its own.
    """
    mean_B = terms.axis.mean(terms.log_ratio_N).to(terms.log_ratio_N.dtype)
    if terms.token_advantages_N is not None:
        own_N = terms.log_ratio_N - terms.log_ratio_N.detach()
        ratio_N = terms.axis.spread(mean_B).detach() + own_N
        return _clipped(ratio_N, terms.advantages_N, config)
    sequence = _clipped(mean_B, terms.advantages_B, config)
    return Surrogate(terms.axis.spread(sequence.values_N), terms.axis.spread(sequence.clipped_N))


def _gmpo(terms: Terms, config: ObjectiveConfig) -> Surrogate:
    """A times the geometric mean of token ratios, each clipped on one side, arXiv 2507.20673 [P].

    `clip_low` and `clip_high` are exponents here: the bounds are e^-low and e^high (0.4 in the
    paper). As in PPO only the side that would raise the objective is clipped.
    """
    advantages_N = terms.advantages_N
    free_N = terms.log_ratio_N
    upper_N = free_N.clamp(max=config.clip_high)
    lower_N = free_N.clamp(min=-config.clip_low)
    bounded_N = torch.where(advantages_N > 0, upper_N, lower_N)
    mean_B = terms.axis.mean(bounded_N).to(free_N.dtype)
    values_B = bounded_exp(mean_B) * terms.advantages_B
    return Surrogate(terms.axis.spread(values_B), (bounded_N != free_N) & (advantages_N != 0))


def _cispo(terms: Terms, config: ObjectiveConfig) -> Surrogate:
    """sg[clip(r, 1 - low, 1 + high)] A log pi, arXiv 2506.13585 [P]: every token keeps a gradient.

    clip_low >= 1 means no lower bound. Under a trace, log pi is replaced by its trace in the
    gradient only; the value stays that of log pi.
    """
    ratio_N = bounded_exp(terms.log_ratio_N.detach())
    bounded_N = ratio_N.clamp(1 - config.clip_low, 1 + config.clip_high)
    scale_N = bounded_N * terms.advantages_N
    return Surrogate(scale_N * log_policy(terms), bounded_N != ratio_N)


def _gpg(terms: Terms, config: ObjectiveConfig) -> Surrogate:
    """A log pi, arXiv 2504.02546 [P]: no ratio, no clip. Its alpha is in `batch_scale`."""
    values_N = terms.advantages_N * log_policy(terms)
    return Surrogate(values_N, torch.zeros_like(values_N, dtype=torch.bool))


def _guide(terms: Terms, config: ObjectiveConfig, *, gamma_quantile: Share = 0.9) -> Surrogate:
    """PPO's surrogate, and A r / (r + gamma) for what was sampled behind a hint; Guide.

    arXiv 2506.13923 [P]. There r is the ratio of the policy behind the plain prompt to the sampler
    behind the hint, without a clip, and gamma a quantile of r over the completion (the authors'
    script has micro-batches of one). Its gradient is at most a quarter of PPO's, where r = gamma.
    """
    found = _clipped(terms.log_ratio_N, terms.advantages_N, config)
    if terms.elsewhere_gap_N is None or terms.elsewhere_B is None:
        return found
    elsewhere_N = terms.axis.spread(terms.elsewhere_B)
    ratio_N = bounded_exp(terms.log_ratio_N + terms.elsewhere_gap_N)
    gamma_B = torch.ones_like(terms.advantages_B)
    parts = ratio_N.detach().split(terms.axis.lengths_B.tolist())
    for completion in terms.elsewhere_B.nonzero()[:, 0].tolist():
        if len(parts[completion]):
            gamma_B[completion] = torch.quantile(parts[completion], gamma_quantile)
    shaped_N = ratio_N / (ratio_N + terms.axis.spread(gamma_B))
    return Surrogate(
        torch.where(elsewhere_N, shaped_N * terms.advantages_N, found.values_N),
        found.clipped_N & ~elsewhere_N,
    )


def _rgr(terms: Terms, config: ObjectiveConfig, *, gamma: ShareBelowOne = 0.1) -> Surrogate:
    """PPO's surrogate, and A pi / (pi_old + gamma) for what was sampled behind another prompt.

    RGR-GRPO, arXiv 2511.12344 [3P]. Both probabilities are behind the plain prompt, and there is no
    clip. So the slope of a token's log-probability is A pi_old / (pi_old + gamma) at pi_old: a
    token that the policy would not have said without help teaches little [D]. The value of gamma
    was not found. With gamma = 0 it is A r.
    """
    found = _clipped(terms.log_ratio_N, terms.advantages_N, config)
    if terms.elsewhere_B is None:
        return found
    elsewhere_N = terms.axis.spread(terms.elsewhere_B)
    # pi / (pi_old + gamma) = r / (1 + gamma / pi_old), which does not divide by a 0 of float32.
    shaped_N = bounded_exp(terms.log_ratio_N) / (1 + gamma * bounded_exp(-terms.anchor_N))
    return Surrogate(
        torch.where(elsewhere_N, shaped_N * terms.advantages_N, found.values_N),
        found.clipped_N & ~elsewhere_N,
    )


@chooses(some_in_band)
def _clip_cov(
    terms: Terms,
    config: ObjectiveConfig,
    *,
    share: ShareBelowOne = 2e-4,
    lowest: NotNegative = 1.0,
    highest: Limit = 5.0,
) -> Surrogate:
    """PPO's surrogate, and none for a few tokens of high covariance: Clip-Cov, arXiv 2505.22617.

    `share` of the update's tokens are drawn from those whose covariance of advantage and
    log-probability lies between `lowest` and `highest`; it is such tokens that take the entropy
    down [P]. verl takes means and draw over each micro-batch [3P], this over the update.
    """
    found = _clipped(terms.log_ratio_N, terms.advantages_N, config)
    chosen_N = _chosen(terms, "clip_cov")
    return Surrogate(found.values_N.masked_fill(chosen_N, 0.0), found.clipped_N | chosen_N)


@chooses(highest_covariance)
def _kl_cov(
    terms: Terms,
    config: ObjectiveConfig,
    *,
    share: ShareBelowOne = 2e-4,
    coefficient: NotNegative = 1.0,
) -> Surrogate:
    """r A, less coefficient |x| for the tokens of highest covariance: KL-Cov, arXiv 2505.22617 [P].

    There is no clip. |x| is the distance of a token's log-probability from its anchor's; at the
    anchor it has no gradient, so the penalty acts from the second update of a batch on.
    """
    chosen_N = _chosen(terms, "kl_cov")
    values_N = bounded_exp(terms.log_ratio_N) * terms.advantages_N
    held_N = torch.where(chosen_N, coefficient * terms.log_ratio_N.abs(), 0.0)
    return Surrogate(values_N - held_N, torch.zeros_like(chosen_N))


def _chosen(terms: Terms, kind: str) -> Tensor:
    if terms.chosen_N is None:
        raise ValueError(f"objective `{kind}` needs chosen_N")
    return terms.chosen_N


def _made_up(lengths: list[int]) -> Terms:
    z_N = torch.linspace(-0.2, 0.3, sum(lengths)).requires_grad_()
    advantages_B = torch.linspace(1.0, -1.0, len(lengths))
    axis = PackedAxis(torch.tensor(lengths))
    return Terms(z_N, z_N.detach() - 1, advantages_B, axis, torch.zeros(sum(lengths)))


def _problem(terms: Terms, surrogate: Surrogate) -> str | None:
    wrong = tensor_problem("values_N", surrogate.values_N, terms.log_ratio_N)
    wrong = wrong or tensor_problem(
        "clipped_N", surrogate.clipped_N, terms.log_ratio_N, boolean=True
    )
    if wrong is None and not surrogate.values_N.requires_grad:
        wrong = "returned values_N without the gradient of terms.log_ratio_N: keep it"
    return wrong or token_metric_problem(surrogate.metrics, terms.log_ratio_N)


OBJECTIVES: Axis[Terms, ObjectiveConfig, Surrogate] = Axis(
    name="objective",
    inputs=Terms,
    result=Surrogate,
    rules={
        "ppo": _ppo,
        "gspo": _gspo,
        "gmpo": _gmpo,
        "cispo": _cispo,
        "gpg": _gpg,
        "sapo": sapo,
        "dppo": dppo,
        "vespo": vespo,
        "dro": dro,
        "disco": disco,
        "clip_cov": _clip_cov,
        "guide": _guide,
        "rgr": _rgr,
        "kl_cov": _kl_cov,
    },
    cases=token_cases(_made_up),
    problem=_problem,
    whole_batch=False,
)


def uses_ratio(config: ObjectiveConfig) -> bool:
    """Whether an objective does anything else away from the anchor than at it."""
    gradients, chooser = [], OBJECTIVES.chooser(config)
    for shift in (0.0, 0.5, -0.5):
        z_N = torch.full((2,), shift, dtype=torch.float64, requires_grad=True)
        logprobs_N = torch.full_like(z_N, -1.0).detach()
        anchor_N, ones_N = logprobs_N - shift, torch.ones_like(logprobs_N)
        columns = TokenColumns(logprobs_N, anchor_N, anchor_N, ones_N, ones_N, ones_N)
        terms = Terms(
            z_N,
            logprobs_N,
            torch.tensor([1.0, -1.0], dtype=torch.float64),
            PackedAxis(torch.tensor([1, 1])),
            torch.zeros_like(logprobs_N),
            chosen_N=None if chooser is None else chooser(columns),
        )
        values_N = OBJECTIVES.rule(config)(terms).values_N
        gradients.append(torch.autograd.grad(values_N.sum(), z_N)[0])
    return not all(torch.equal(gradients[0], each) for each in gradients[1:])


def _unscaled(advantages_V: Tensor, group_V: Tensor) -> float:
    return 1.0


def _share_of_signal(advantages_V: Tensor, group_V: Tensor) -> float:
    """alpha = B / (B - M), M completions of groups without a gradient, arXiv 2504.02546 [P].

    As in the paper's code a group counts as a whole: one whose rewards differ has a gradient, also
    where one of its advantages is 0. 1 if no group has any.
    """
    some_V = torch.isin(group_V, group_V[advantages_V != 0])
    return advantages_V.numel() / max(int(some_V.sum()), 1)


BATCH_SCALES: dict[str, Callable[[Tensor, Tensor], float]] = {"gpg": _share_of_signal}


def batch_scale(kind: str, advantages_V: Tensor, group_V: Tensor) -> float:
    """The factor an objective puts on the whole batch, given what is kept in it."""
    return BATCH_SCALES.get(kind, _unscaled)(advantages_V, group_V)
