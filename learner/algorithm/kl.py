"""Estimates of KL(pi || reference) at a sampled token, in nats.

With d = log pi_ref - log pi, and r = pi / anchor where the anchor sampled the token:

    k1                -d              unbiased in value; as a loss its expected gradient is 0 [D]
    k2                d^2 / 2         biased in value; its expected gradient is the KL's [D]
    k3                e^d - d - 1     unbiased in value, never negative; GRPO, arXiv 2402.03300 [P]
    straight_through  value of k3, gradient of k2: verl's `k3+` [3P]
    unbiased          r (e^d - d - 1) unbiased in value and gradient, also off-policy:
                      DeepSeek-V3.2, arXiv 2512.02556 [P]; TRL's `use_bias_correction_kl` [3P]

"Unbiased" is meant for tokens of the policy itself, but for the last one. At r = 1 the gradient of
`unbiased` differs from that of k3 by k3 grad log pi.

Legend: N trained tokens. Evidence tags: [P] paper, [3P] third parties, [D] derived.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from learner.algorithm.surrogates import bounded_exp


def k1(logprobs_N: Tensor, reference_N: Tensor, log_ratio_N: Tensor) -> Tensor:
    """The log-ratio itself."""
    return logprobs_N - reference_N


def k2(logprobs_N: Tensor, reference_N: Tensor, log_ratio_N: Tensor) -> Tensor:
    """Half the square of the log-ratio."""
    return (logprobs_N - reference_N) ** 2 / 2


def k3(logprobs_N: Tensor, reference_N: Tensor, log_ratio_N: Tensor) -> Tensor:
    """GRPO's estimate exp(d) - d - 1, which pulls towards the reference at every distance."""
    gap_N = reference_N - logprobs_N
    return bounded_exp(gap_N) - gap_N - 1


def straight_through(logprobs_N: Tensor, reference_N: Tensor, log_ratio_N: Tensor) -> Tensor:
    """The value of k3 with the gradient of k2."""
    value_N = k3(logprobs_N, reference_N, log_ratio_N).detach()
    slope_N = k2(logprobs_N, reference_N, log_ratio_N)
    return slope_N + (value_N - slope_N.detach())


def unbiased(logprobs_N: Tensor, reference_N: Tensor, log_ratio_N: Tensor) -> Tensor:
    """The ratio to the anchor times k3; both carry a gradient."""
    return bounded_exp(log_ratio_N) * k3(logprobs_N, reference_N, log_ratio_N)


ESTIMATORS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "k1": k1,
    "k2": k2,
    "k3": k3,
    "straight_through": straight_through,
    "unbiased": unbiased,
}
"""Called with log pi, log pi_ref and log pi - log anchor of every token."""
