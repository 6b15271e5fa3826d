"""The aggregation axis: one weight a completion, so that the loss is -sum_i w_i sum_t l_{i,t}.

The weights come from the whole global batch, once. A microbatch or a rank then only sums its own
completions, and its part adds up to the global loss whatever the split.

    sequence_mean  1 / (V |o_i|)       GRPO, arXiv 2402.03300 [P]
    token_mean     1 / sum_i |o_i|     DAPO, arXiv 2503.14476 [P]
    constant       1 / (V L_max)       Dr. GRPO, arXiv 2503.20783 [P]
    lambda_grpo    f_i / sum_i |o_i|   lambda-GRPO, arXiv 2510.06870, f learnable

Legend: V completions of the batch that count (with a reward, not rejected), P groups; |o_i| counts
trained tokens. Evidence tags: [P] paper, [R] reviewer, [3P] third parties, [D] derived.
"""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from common.config.algorithm import AggregationConfig
from learner.algorithm.axis import Axis, Rule, number_problem, tensor_problem

PREFERENCE_FLOOR = 1e-3
"""Least value of h = 1 + r z. With r = 1/9 only groups of more than 81 reach it [D]."""

EXPONENT_LIMIT = 50.0
"""Bound of lambda * ln h, so that a lambda that runs away cannot overflow."""

LAMBDA_METRIC = "lambda_grpo/lambda"


@dataclass(frozen=True)
class KeptCompletions:
    """The completions of the global batch that count, for a rule that weighs them; all [V]."""

    lengths_V: Tensor  # long, trained tokens
    group_V: Tensor  # long, the index of each completion's group
    advantages_V: Tensor  # float64
    max_completion_tokens: int


@dataclass(frozen=True)
class TokenWeights:
    """The weight of every token of a completion."""

    weights_V: Tensor  # float64
    metrics: Mapping[str, float] = field(default_factory=dict)


class LearnedAggregation(Rule[KeptCompletions, TokenWeights]):
    """An aggregation that learns from every optimiser step."""

    @abstractmethod
    def end_step(self, kept: KeptCompletions, surrogate_sums_V: Tensor) -> Mapping[str, float]:
        """Learn from a step that was taken, and return metrics.

        Args:
            kept: what the weights of the step were made from.
            surrogate_sums_V: float64, sum_t l_{i,t} over all ranks.
        """


def _sequence_mean(kept: KeptCompletions, config: AggregationConfig) -> TokenWeights:
    lengths_V = kept.lengths_V.double()
    return TokenWeights(1 / (lengths_V.numel() * lengths_V.clamp(min=1)))


def _token_mean(kept: KeptCompletions, config: AggregationConfig) -> TokenWeights:
    return TokenWeights(_share_of_tokens(kept.lengths_V))


def _constant(kept: KeptCompletions, config: AggregationConfig) -> TokenWeights:
    size = max(kept.lengths_V.numel(), 1)
    weight = 1 / (size * kept.max_completion_tokens)
    return TokenWeights(torch.full_like(kept.lengths_V, weight, dtype=torch.float64))


def _share_of_tokens(lengths_V: Tensor) -> Tensor:
    lengths_V = lengths_V.double()
    return torch.ones_like(lengths_V) / lengths_V.sum().clamp(min=1)


def _group_softmax(scores_V: Tensor, group_V: Tensor, groups: int) -> Tensor:
    highest_P = scores_V.new_zeros(groups).scatter_reduce(
        0, group_V, scores_V, "amax", include_self=False
    )
    powers_V = (scores_V - highest_P[group_V]).exp()
    return powers_V / powers_V.new_zeros(groups).index_add(0, group_V, powers_V)[group_V]


def length_preference(
    lengths_V: Tensor, group_V: Tensor, lambda_: float, length_scale: float
) -> tuple[Tensor, Tensor]:
    """Preference f(o_i) of lambda-GRPO and its derivative df_i/dlambda, each [V] float64.

    z_i = (|o_i| - mu) / sigma with the population sigma of the group; h_i = 1 + r z_i [R];
    g_i = h_i^lambda; f_i = G softmax_i(g), the softmax over g itself [3P]. Hence sum_i f_i = G,
    f = 1 at lambda = 0 or when all lengths of the group are equal, and [D]
    df_i/dlambda = G s_i (dg_i - sum_j s_j dg_j), s = softmax(g), dg = h^lambda ln h.
    """
    lengths_V = lengths_V.double()
    groups = int(group_V.max()) + 1 if group_V.numel() else 0

    def group_sum(values_V: Tensor) -> Tensor:
        return values_V.new_zeros(groups).index_add(0, group_V, values_V)[group_V]

    size_V = group_sum(torch.ones_like(lengths_V))
    # In units of 1/G, lengths are integers: equal lengths give exactly 0, not rounding noise.
    centred_V = (lengths_V * size_V - group_sum(lengths_V)) / size_V
    sigma_V = (group_sum(centred_V**2) / size_V).sqrt()
    z_V = torch.where(sigma_V > 0, centred_V / sigma_V, 0.0)
    h_V = 1 + length_scale * z_V
    if bool((h_V < PREFERENCE_FLOOR).any()):
        warnings.warn(
            f"lambda_grpo: length preference {float(h_V.min()):.3f} clamped to {PREFERENCE_FLOOR} "
            f"in a group of {int(size_V.max())}; lower aggregation.length_scale "
            f"({length_scale:.4f}) below 1 / sqrt(G - 1) to avoid it",
            stacklevel=2,
        )
    log_h_V = h_V.clamp(min=PREFERENCE_FLOOR).log()
    exponent_V = lambda_ * log_h_V
    g_V = exponent_V.clamp(max=EXPONENT_LIMIT).exp()
    dg_V = (g_V * log_h_V).masked_fill(exponent_V > EXPONENT_LIMIT, 0.0)
    share_V = _group_softmax(g_V, group_V, groups)
    if bool(((share_V > 0.5) & (size_V > 2)).any()):
        warnings.warn(
            f"lambda_grpo: with lambda {lambda_:.3g} one completion has more than half of its "
            "group's weight; lower aggregation.lambda_learning_rate, or start anew",
            stacklevel=2,
        )
    derivative_V = size_V * share_V * (dg_V - group_sum(share_V * dg_V))
    return size_V * share_V, derivative_V


class LambdaGrpo(LearnedAggregation):
    """Learnable length preference: one scalar lambda, trained by its own SGD [3P: 0.0, lr 0.1].

    lambda = 0 is `token_mean` exactly; lambda < 0 favours short answers, lambda > 0 long ones [D].
    Every rank holds the same lambda, because every rank feeds `end_step` the same global sums.
    """

    def __init__(self, config: AggregationConfig) -> None:
        self._config = config
        self.lambda_ = config.lambda_init

    def __call__(self, kept: KeptCompletions) -> TokenWeights:
        preference_V, _ = self._preference(kept)
        return TokenWeights(preference_V * _share_of_tokens(kept.lengths_V))

    def gradient(self, kept: KeptCompletions, surrogate_sums_V: Tensor) -> float:
        """Gradient dL/dlambda = -(1 / sum|o|) sum_i df_i/dlambda sum_t l_{i,t} [D]."""
        _, derivative_V = self._preference(kept)
        pull_V = derivative_V * surrogate_sums_V.double()
        return -float((pull_V * _share_of_tokens(kept.lengths_V)).sum())

    def end_step(self, kept: KeptCompletions, surrogate_sums_V: Tensor) -> Mapping[str, float]:
        gradient = self.gradient(kept, surrogate_sums_V)
        self.lambda_ -= self._config.lambda_learning_rate * gradient
        return {LAMBDA_METRIC: self.lambda_, "lambda_grpo/gradient": gradient}

    def state_dict(self) -> dict[str, float]:
        return {"lambda": self.lambda_}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.lambda_ = float(state["lambda"])

    def _preference(self, kept: KeptCompletions) -> tuple[Tensor, Tensor]:
        scale = self._config.length_scale
        return length_preference(kept.lengths_V, kept.group_V, self.lambda_, scale)


def _made_up(lengths: list[int], groups: list[int]) -> KeptCompletions:
    group_V = torch.tensor(groups, dtype=torch.long)
    advantages_V = torch.linspace(-1, 1, len(lengths), dtype=torch.float64)
    return KeptCompletions(torch.tensor(lengths, dtype=torch.long), group_V, advantages_V, 8)


def _problem(kept: KeptCompletions, found: TokenWeights) -> str | None:
    wrong = tensor_problem("weights_V", found.weights_V, kept.lengths_V)
    return wrong or number_problem(found.metrics)


def _learn(rule: Rule[KeptCompletions, TokenWeights], kept: KeptCompletions) -> Mapping[str, float]:
    if not isinstance(rule, LearnedAggregation):
        return {}
    return rule.end_step(kept, kept.advantages_V)


AGGREGATIONS: Axis[KeptCompletions, AggregationConfig, TokenWeights] = Axis(
    name="aggregation",
    inputs=KeptCompletions,
    result=TokenWeights,
    rules={
        "sequence_mean": _sequence_mean,
        "token_mean": _token_mean,
        "constant": _constant,
        "lambda_grpo": LambdaGrpo,
    },
    cases={
        "completions of [2, 0, 3] tokens": partial(_made_up, [2, 0, 3], [0, 0, 1]),
        "no completion at all": partial(_made_up, [], []),
    },
    problem=_problem,
    whole_batch=True,
    end_step=_learn,
)
