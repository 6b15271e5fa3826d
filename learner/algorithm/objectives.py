"""The objective axis: log-ratio and advantage -> the surrogate of every token, to be maximised.

Every objective sees the log-ratio z of the credit axis (log pi - log pi_old, or its trace) and
returns a value a token. Those at sequence level give every token of a completion the same value,
so that a sum over tokens weighted by 1 / |o_i| is the sequence's own objective.

Ratios are exp(z) up to z = `LOG_RATIO_LIMIT` and its tangent from there on: e^20 = 5e8 keeps every
product and sum of float32 finite, and the gradient bounded without ever vanishing.

Legend: N trained tokens, B completions. Evidence tags: [P] paper, [D] derived.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from common.config.algorithm import ObjectiveConfig
from learner.algorithm.axis import Axis, tensor_problem, token_cases, token_metric_problem
from learner.algorithm.traces import PackedAxis

LOG_RATIO_LIMIT = 20.0


@dataclass(frozen=True)
class Terms:
    """What an objective is made from: a micro-batch."""

    log_ratio_N: Tensor  # z, carries the gradient
    logprobs_N: Tensor  # log pi, detached
    advantages_B: Tensor
    axis: PackedAxis
    behaviour_gap_N: Tensor  # log pi_old - log mu, 0 where the token was not sampled

    @cached_property
    def advantages_N(self) -> Tensor:
        """The advantage of every token: that of its completion."""
        return self.axis.spread(self.advantages_B)


@dataclass(frozen=True)
class Surrogate:
    """What an objective makes of the tokens of a micro-batch."""

    values_N: Tensor  # to be maximised, carries the gradient
    clipped_N: Tensor  # bool: the clip is active
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    """A value a token under each name, [N]; the mean over the step's trained tokens is recorded."""


def bounded_exp(log_ratio: Tensor) -> Tensor:
    """The exponential up to LOG_RATIO_LIMIT, and its tangent beyond."""
    beyond = (log_ratio - LOG_RATIO_LIMIT).clamp(min=0.0)
    return log_ratio.clamp(max=LOG_RATIO_LIMIT).exp() + math.exp(LOG_RATIO_LIMIT) * beyond


def k3(logprobs_N: Tensor, reference_N: Tensor) -> Tensor:
    """The k3 estimate of KL(pi || ref), nats a token: exp(d) - d - 1 with d = log pi_ref - log pi.

    Its gradient pulls towards the reference at every distance. arXiv 2402.03300, eq. 4 [P].
    """
    gap_N = reference_N - logprobs_N
    return bounded_exp(gap_N) - gap_N - 1


def _clipped(log_ratio: Tensor, advantages: Tensor, config: ObjectiveConfig) -> Surrogate:
    ratio = bounded_exp(log_ratio)
    free = ratio * advantages
    bounded = ratio.clamp(1 - config.clip_low, 1 + config.clip_high) * advantages
    return Surrogate(torch.minimum(free, bounded), bounded < free)


def _ppo(terms: Terms, config: ObjectiveConfig) -> Surrogate:
    """min(r A, clip(r, 1 - low, 1 + high) A); low = high is PPO's, high > low DAPO's clip [P]."""
    return _clipped(terms.log_ratio_N, terms.advantages_N, config)


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
    return Surrogate(scale_N * _log_policy(terms), bounded_N != ratio_N)


def _gpg(terms: Terms, config: ObjectiveConfig) -> Surrogate:
    """A log pi, arXiv 2504.02546 [P]: no ratio, no clip. Its alpha is in `batch_scale`."""
    values_N = terms.advantages_N * _log_policy(terms)
    return Surrogate(values_N, torch.zeros_like(values_N, dtype=torch.bool))


def _log_policy(terms: Terms) -> Tensor:
    """The value of log pi with the gradient of z."""
    return terms.logprobs_N + terms.log_ratio_N - terms.log_ratio_N.detach()


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
    rules={"ppo": _ppo, "gspo": _gspo, "gmpo": _gmpo, "cispo": _cispo, "gpg": _gpg},
    cases=token_cases(_made_up),
    problem=_problem,
    whole_batch=False,
)


def _unscaled(advantages_V: Tensor) -> float:
    return 1.0


def _share_of_signal(advantages_V: Tensor) -> float:
    """alpha = B / (B - M), M completions without a gradient, arXiv 2504.02546 [P]; 1 if all are."""
    return advantages_V.numel() / max(int((advantages_V != 0).sum()), 1)


BATCH_SCALES: dict[str, Callable[[Tensor], float]] = {"gpg": _share_of_signal}


def batch_scale(kind: str, advantages_V: Tensor) -> float:
    """The factor an objective puts on the whole batch, given the advantages kept in it."""
    return BATCH_SCALES.get(kind, _unscaled)(advantages_V)
