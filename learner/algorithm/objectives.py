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
from common.config.bounds import above, or_infinite
from learner.algorithm.axis import Axis, tensor_problem, token_cases, token_metric_problem
from learner.algorithm.surrogates import Surrogate, Terms, bounded_exp, log_policy
from learner.algorithm.traces import PackedAxis
from learner.algorithm.trust_regions import dppo, dro, sapo, vespo


def k3(logprobs_N: Tensor, reference_N: Tensor) -> Tensor:
    """The k3 estimate of KL(pi || ref), nats a token: exp(d) - d - 1 with d = log pi_ref - log pi.

    Its gradient pulls towards the reference at every distance. arXiv 2402.03300, eq. 4 [P].
    """
    gap_N = reference_N - logprobs_N
    return bounded_exp(gap_N) - gap_N - 1


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

    The gradient runs through s_i into every token of the completion.
    """
    mean_B = terms.axis.mean(terms.log_ratio_N).to(terms.log_ratio_N.dtype)
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
    },
    cases=token_cases(_made_up),
    problem=_problem,
    whole_batch=False,
)


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
